"""A document of one's own as plain text: text, Markdown, HTML, EPUB and PDF, read by Beautiful Soup and pypdf.

Headings become Markdown headings (`# ...`), and HTML's code and tables those of Markdown, so that whatever reads the text finds
them the same way in every format. Where a format has pages, the text remembers where each begins.
"""

import bisect
import importlib.util
import io
import logging
import posixpath
import re
import shlex
import statistics
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from bs4 import BeautifulSoup
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString, Tag
from pypdf import PdfReader
from pypdf.errors import PyPdfError

from longlora.data.sentences import FENCED

logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it cannot read it raises, and that is said in our one line
LARGEST = 2**28
"""Bytes of a document, unpacked. What is larger is hardly one text."""
PLAIN = (".txt", ".md", ".markdown", ".rst", ".text")
HTML = (".html", ".htm", ".xhtml")
SUFFIXES = (*PLAIN, *HTML, ".epub", ".pdf")
WEB = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}
"""What browsers take these for (the WHATWG's Encoding standard)."""
RUNNING = 3
"""Lines at the head or foot of a PDF's page, at most, that are looked at for what runs through its pages."""
UNREAD = ["script", "style", "template", "noscript", "head", "nav", "button", "select"]
"""What is no text, or leads through the pages and says nothing of them."""
BLOCKS = [
    "p",
    "div",
    "section",
    "article",
    "main",
    "header",
    "footer",
    "aside",
    "figure",
    "figcaption",
    "details",
    "summary",
    "form",
    "address",
    "li",
    "tr",
    "table",
    "caption",
    "blockquote",
    "pre",
    "ul",
    "ol",
    "dl",
    "dt",
    "dd",
    "hr",
]
HEADINGS = re.compile(r"^h[1-6]$")
CELL = 400
"""Characters of a table's cell, at most; a longer one is text that a table only arranges."""
LISTING = 0.8
"""The share of a page that is no code any more, though it stands in `pre`: a mail, an RFC."""
LIGATURE = re.compile("[\ufb00-\ufb06]")
"""Signs that a PDF's font has for "fi" and the like, and that no word is spelt with."""
PARTED = re.compile(r"(?P<left>[^\W\d_]+)(?P<mark>[-\u00ad])\n(?P<right>[^\W\d_]+)(?P<rest>\S*)\s?")
"""A word at the end of a PDF's line that goes on in the next one."""
STOPPED = re.compile(r"[.!?:;,\u2026\u3002]['\"\u2019\u201d)\]]*$|[-\u2013\u2014(]$")
"""The end of a line that is followed by a new sentence, or by more of its own."""
SHORT = 0.75
"""Of the page's median line: a line of a PDF that is shorter may end a paragraph or be a heading."""


@dataclass(frozen=True)
class Document:
    name: str
    """The file's name without suffix."""
    text: str
    pages: tuple[int, ...] = ()
    """Where each page begins, as an index of `text`; empty without pages."""

    def page(self, at: int) -> int | None:
        """The page, from 1, that holds character `at`."""
        return bisect.bisect_right(self.pages, at) if self.pages else None

    def line(self, at: int) -> int:
        """The line, from 1, that holds character `at`."""
        return self.text.count("\n", 0, at) + 1


def located(name: str) -> Path:
    """The file or folder `name`; if there is none, the folder of the installed Python package of that name, whose texts count.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).exists():
        return Path(name)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no file, folder or installed package '{name}' (seen from {Path.cwd()})")
    return Path(next(iter(spec.submodule_search_locations)))


def read_documents(place: Path, *, encoding: str = "utf-8") -> list[Document]:
    """The document `place`, or all with a known suffix below it, in order of their paths, but none that is hidden. Where several
    have the same name, it is their path.

    Raises:
        ValueError: as `read_document`, or nothing is there.
    """
    if place.is_file():
        return [read_document(place, encoding=encoding)]
    known = (f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    files = sorted(f for f in known if not any(part.startswith(".") for part in f.relative_to(place).parts))
    if not files:
        raise ValueError(f"no document at {place} (seen from {Path.cwd()}); read are {', '.join(SUFFIXES)}")
    times = Counter(file.stem for file in files)
    documents = ((file, read_document(file, encoding=encoding)) for file in files)
    return [d if times[d.name] == 1 else replace(d, name=f.relative_to(place).as_posix()) for f, d in documents]


def read_document(file: Path, *, encoding: str = "utf-8") -> Document:
    """The text of a file; `encoding` is of plain text and HTML (HTML that is not in it may say its own).

    Raises:
        ValueError: it is not there, or too large; or as `parsed`.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name one document in it")
    if not file.is_file():
        raise ValueError(f"no document {file} (seen from {Path.cwd()})")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, and a document at most {LARGEST:,}: cut it")
    return parsed(file.read_bytes(), file, encoding=encoding)


def parsed(raw: bytes, file: Path, *, encoding: str = "utf-8") -> Document:
    """The text of bytes that come from `file`, which need not be there: its suffix says how to read them.

    Raises:
        ValueError: they are encrypted, of another kind or encoding than they say, or hold no text.
    """
    if encoding == "utf-8":
        encoding = "utf-8-sig"  # a mark at the beginning, as Windows writes it, is no text
    suffix = file.suffix.lower()
    pages: tuple[int, ...] = ()
    if suffix == ".pdf":
        text, pages = pdf_text(raw, file)
    elif suffix == ".epub":
        text = epub_text(raw, file)
    elif suffix in HTML:
        own = EncodingDetector.find_declared_encoding(raw, is_html=True)
        text = html_text(decoded(raw, file, encoding, own=WEB.get(own or "", own)))
    elif suffix in PLAIN or not suffix:
        text = decoded(raw, file, encoding).replace("\r\n", "\n").replace("\r", "\n")
    else:
        raise ValueError(f"{file}: documents are read from {', '.join(SUFFIXES)}, not from '{suffix}'")
    if not text.strip():
        raise ValueError(
            f"{file} holds no text{': a scan, perhaps, which has to be read by OCR first' if pages else ''}"
        )
    return Document(file.stem, text, pages)


def decoded(raw: bytes, file: Path, encoding: str, *, own: str | None = None) -> str:
    """Text in `encoding`, or, where it is not, in the one that it says to be its `own`."""
    try:
        text = raw.decode(encoding)
    except LookupError:
        raise ValueError(f"no encoding '{encoding}'; such as utf-8, latin-1, cp1252") from None
    except UnicodeDecodeError as error:
        if own:
            return decoded(raw, file, own)
        raise ValueError(
            f"{file} is not {encoding.removesuffix('-sig')}: byte {error.start} is {raw[error.start]:#04x}; "
            "name its encoding, such as latin-1, or convert it: "
            f"iconv -f latin1 -t utf-8 {shlex.quote(str(file))} > converted{file.suffix}"
        ) from None
    if "\0" in text:
        raise ValueError(f"{file} is not text: character {text.index(chr(0))} is a NUL")
    return text


def html_text(html: str | bytes) -> str:
    """The text that a reader sees, a blank line between blocks; headings, code and tables in Markdown."""
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup(UNREAD):
        tag.decompose()
    for string in soup.find_all(string=True):
        if type(string) is not NavigableString:  # a comment, a doctype
            string.extract()
        elif not string.find_parent("pre"):
            string.replace_with(re.sub(r"\s+", " ", string.replace("\u00ad", "")))  # soft hyphens are not seen
    tables = [t for t in soup("table") if not t.find(["table", "pre", HEADINGS])]
    for tag in soup("br"):
        tag.replace_with("\n")
    for tag in listings(soup):
        tag.replace_with(fenced(tag.get_text()))
    for tag in soup(["td", "th"]):
        tag.append(" ")
    for tag in soup(BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    for tag in soup(HEADINGS):
        heading = " ".join(tag.get_text().split()).rstrip(" ¶")  # Sphinx's link to the heading
        tag.replace_with(f"\n\n{'#' * int(tag.name[1])} {heading}\n\n" if heading else "")
    for table in tables:
        if rows := cells(table):
            title = table.find("caption")
            table.replace_with(f"\n\n{title.get_text() if title else ''}\n\n{ruled(rows)}\n\n")
    return tidied(soup.get_text())


def listings(soup: BeautifulSoup) -> list[Tag]:
    """The tags that hold code: `pre`, but not where a page is hardly anything else, and `code` that is all of its paragraph."""
    blocks = soup("pre")
    if sum(len(b.get_text()) for b in blocks) > LISTING * len(soup.get_text().strip()):
        return []
    alone = [c for c in soup("code") if c.parent and c.parent.name in ("p", "div") and not c.find_parent("pre")]
    return blocks + [c for c in alone if c.parent and c.parent.get_text().strip() == c.get_text().strip()]


def fenced(code: str) -> str:
    """Code between fences that are longer than what it holds of them."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"\n\n{fence}\n{code.strip(chr(10))}\n{fence}\n\n" if code.strip() else ""


def cells(table: Tag) -> list[list[str]]:
    """The rows of a table of data; none where it only arranges text: it has one row or column, or a cell with several blocks."""
    texts = [[cell.get_text().strip() for cell in row(["td", "th"])] for row in table("tr")]
    rows = [row for row in texts if any(row)]
    arranged = any(len(text) > CELL or re.search(r"\n\s*\n", text) for row in rows for text in row)
    return rows if len(rows) > 1 and max(map(len, rows)) > 1 and not arranged else []


def ruled(rows: list[list[str]]) -> str:
    """A Markdown table, the first row as its names."""
    lines = ["| " + " | ".join(" ".join(text.split()) for text in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def tidied(text: str) -> str:
    """No white space around lines, and one blank line at most between them; code between fences as it is."""
    tidy, done = "", 0
    for code in FENCED.finditer(text):
        tidy, done = tidy + bare(text[done : code.start()]) + code.group() + "\n\n", code.end()
    return (tidy + bare(text[done:])).strip() + "\n"


def bare(text: str) -> str:
    """Text outside of code, a blank line behind it."""
    lines = "\n".join(line.strip() for line in text.splitlines()).strip()
    return re.sub(r"\n{3,}", "\n\n", lines) + "\n\n" if lines else ""


def epub_text(raw: bytes, file: Path) -> str:
    """The chapters of an EPUB in the order of its spine (EPUB 3.3, section 5)."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            if sum(part.file_size for part in book.infolist()) > LARGEST:
                raise ValueError(f"{file} unpacks to more than {LARGEST:,} bytes")
            if any(part.flag_bits & 1 for part in book.infolist()):
                raise ValueError(f"{file} is encrypted: save a copy without its password first")
            chapters = list(spine(book))
            if locked(book).intersection(chapters):
                raise ValueError(f"{file} is encrypted: its chapters open with a licence (DRM) only")
            texts = (html_text(book.read(chapter)).strip() for chapter in chapters)
            return "\n\n".join(text for text in texts if text) + "\n"
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError, ElementTree.ParseError) as error:
        raise ValueError(f"{file} is not an EPUB: {error}") from None


def spine(book: zipfile.ZipFile) -> Iterator[str]:
    """Paths of the chapters inside the archive."""
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    package = next((e.attrib["full-path"] for e in container.iter() if e.tag.endswith("}rootfile")), None)
    if package is None:
        raise zipfile.BadZipFile("META-INF/container.xml names no rootfile")
    root = ElementTree.fromstring(book.read(package))
    items = {e.attrib["id"]: e.attrib["href"] for e in root.iter() if e.tag.endswith("}item")}
    folder = package.rpartition("/")[0]
    for reference in (e for e in root.iter() if e.tag.endswith("}itemref")):
        yield posixpath.normpath(posixpath.join(folder, unquote(items[reference.attrib["idref"]])))


def locked(book: zipfile.ZipFile) -> set[str]:
    """Paths of what is encrypted (EPUB 3.3, section 4.2.6.3.2): chapters under DRM, or fonts alone."""
    if "META-INF/encryption.xml" not in book.namelist():
        return set()
    said = ElementTree.fromstring(book.read("META-INF/encryption.xml"))
    return {unquote(e.attrib["URI"]) for e in said.iter() if e.tag.endswith("}CipherReference")}


def pdf_text(raw: bytes, file: Path) -> tuple[str, tuple[int, ...]]:
    """The text of a PDF's pages, and where each begins."""
    try:
        reader = PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError(f"{file} is encrypted: save a copy without its password first")
        texts = [LIGATURE.sub(letters, page.extract_text()).strip() for page in reader.pages]
    except PyPdfError as error:
        raise ValueError(f"{file} is not a PDF that can be read: {error}") from None
    texts = [paragraphs(page) for page in unhyphenated(without_running_lines(texts))]
    starts, text = [], ""
    for page, following in zip(texts, [*texts[1:], ""], strict=True):
        starts.append(len(text))
        text += page + ("\n" if goes_on(page, following) else "\n\n")
    return text, tuple(starts)


def letters(ligature: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", ligature.group())


def goes_on(line: str, following: str) -> bool:
    """Whether what ends without a stop is followed by what begins no sentence."""
    return not STOPPED.search(line) and following[:1].islower()


def paragraphs(page: str) -> str:
    """A page with a blank line behind every short line that ends no sentence and is followed by a beginning: headings, rows of a
    table. In a PDF they stand on lines of their own and nothing else parts them from the sentences below."""
    rows = page.splitlines() or [""]
    short = SHORT * statistics.median(map(len, rows))
    text = ""
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        alone = len(row) < short and not STOPPED.search(row) and not following[:1].islower()
        text += row + ("\n\n" if alone else "\n")
    return text.strip()


def unhyphenated(pages: list[str]) -> list[str]:
    """The pages with words whole that were parted at the end of a line: by a soft hyphen, or where the document also has them in
    one piece (else the hyphen may be their own)."""
    known = set(re.findall(r"[^\W\d_]+", " ".join(pages)))

    def whole(parted: re.Match[str]) -> str:
        word = parted["left"] + parted["right"]
        return f"{word}{parted['rest']}\n" if word in known or parted["mark"] == "\u00ad" else parted.group()

    return [PARTED.sub(whole, page) for page in pages]


def without_running_lines(pages: list[str]) -> list[str]:
    """The pages without the lines at their heads and feet that stand, numbers aside, on a third of them or more: titles of a book
    or chapter and page numbers, which are no part of the sentence that goes on below them. A page is never left without a line.
    """
    lines = [page.splitlines() for page in pages]
    for end in (0, -1):
        for _ in range(RUNNING):
            heads = [re.sub(r"\d+", "#", rows[end]).strip() if len(rows) > 1 else "" for rows in lines]
            often = {head for head, times in Counter(heads).items() if runs(head) and times >= max(3, len(pages) / 3)}
            lines = [without_end(rows, end) if head in often else rows for rows, head in zip(lines, heads, strict=True)]
    return ["\n".join(rows).strip() for rows in lines]


def runs(head: str) -> bool:
    """Whether a line can be one that runs through pages: it has letters, or one number alone; several are a table's row."""
    return any(map(str.isalpha, head)) or head.count("#") == 1


def without_end(rows: list[str], end: int) -> list[str]:
    return rows[1:] if end == 0 else rows[:-1]
