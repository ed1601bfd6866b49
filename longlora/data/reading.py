"""A document of one's own as plain text: text, Markdown, HTML, EPUB and PDF.

Headings become Markdown headings (`# ...`), and HTML's code and tables those of Markdown, so that whatever reads the text finds
them the same way in every format. Where a format has pages, the text remembers where each begins.
"""

import bisect
import importlib.util
import os
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from bs4.dammit import EncodingDetector

from longlora.data.epub_text import epub_text
from longlora.data.html_text import html_text
from longlora.data.pdf_text import pdf_text

LARGEST = 2**28
"""Bytes of a document, unpacked. What is larger is hardly one text."""
PLAIN = (".txt", ".md", ".markdown", ".rst", ".text")
HTML = (".html", ".htm", ".xhtml")
SUFFIXES = (*PLAIN, *HTML, ".epub", ".pdf")
WEB = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "utf-16": "utf-8"}
"""What browsers take these for (the WHATWG's Encoding and HTML standards)."""

UTF_16 = (BOM_UTF16_LE, BOM_UTF16_BE)
"""What such a text begins with."""


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
    if name and Path(name).exists():  # an empty name is the current folder's, and nobody means that by it
        return Path(name)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no file, folder or installed package '{name}' (seen from {Path.cwd()})")
    return Path(next(iter(spec.submodule_search_locations)))


def read_documents(place: Path, *, encoding: str = "utf-8") -> list[Document]:
    """The document `place`, or all with a known suffix below it, in order of their paths, but none that is hidden; in a folder, one
    may hold no text. Where several have the same name, it is their path.

    Raises:
        ValueError: as `read_document`, or nothing is there.
    """
    if place.is_file():
        return [read_document(place, encoding=encoding)]
    known = (f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    files = sorted(f for f in known if not any(part.startswith(".") for part in f.relative_to(place).parts))
    if not files:
        raise ValueError(f"no document at {place} (seen from {Path.cwd()}); read are {', '.join(SUFFIXES)}")
    times = Counter(readable(file.stem) for file in files)
    documents = ((file, read_document(file, encoding=encoding, blank=True)) for file in files)
    return [
        d if times[d.name] == 1 else replace(d, name=readable(f.relative_to(place).as_posix())) for f, d in documents
    ]


def read_document(file: Path, *, encoding: str = "utf-8", blank: bool = False) -> Document:
    """The text of a file; `encoding` is of plain text, and of pages (HTML, an EPUB's chapters) that do not say their own. One that
    is `blank` may be meant.

    Raises:
        ValueError: it is not there, or too large; or as `parsed`.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name one document in it")
    if not file.is_file():
        raise ValueError(f"no document {file} (seen from {Path.cwd()})")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, and a document at most {LARGEST:,}: cut it")
    return parsed(file.read_bytes(), file, encoding=encoding, blank=blank)


def parsed(raw: bytes, file: Path, *, encoding: str = "utf-8", blank: bool = False) -> Document:
    """The text of bytes that come from `file`, which need not be there: its suffix says how to read them.

    Raises:
        ValueError: they are encrypted, of another kind or encoding than they say, or hold no text, unless they may be `blank`.
    """
    suffix = file.suffix.lower()
    pages: tuple[int, ...] = ()
    if suffix == ".pdf":
        text, pages = pdf_text(raw, file)
    elif suffix == ".epub":
        text = epub_text(
            raw, file, largest=LARGEST, page=lambda part, at: page_text(part, at, first="utf-8", last=encoding)
        )
    elif suffix in HTML:
        # of most others any bytes are text, so that what a page says goes first
        checks = encoding.lower().startswith("utf")
        text = page_text(raw, file, first=encoding if checks else None, last=None if checks else encoding)
    elif suffix in PLAIN or not suffix:
        text = decoded(raw, file, encoding).replace("\r\n", "\n").replace("\r", "\n")
    else:
        raise ValueError(f"{file}: documents are read from {', '.join(SUFFIXES)}, not from '{suffix}'")
    if not (blank or text.strip()):
        raise ValueError(
            f"{file} holds no text{': a scan, perhaps, which has to be read by OCR first' if pages else ''}"
        )
    return Document(readable(file.stem), text, pages)


def page_text(raw: bytes, file: Path, *, first: str | None, last: str | None) -> str:
    """The text of a page, in the encoding that its mark says, or `first`, or what the page says itself, or `last`.

    Raises:
        ValueError: as `decoded`.
    """
    mark = EncodingDetector.strip_byte_order_mark(raw)[1]
    said = EncodingDetector.find_declared_encoding(raw, is_html=True)
    return html_text(decoded(raw, file, *filter(None, (mark, first, WEB.get(said or "", said), last))))


def readable(name: str) -> str:
    """A file's name with U+FFFD for bytes that are no UTF-8, which no file of records takes."""
    return os.fsencode(name).decode("utf-8", "replace")


def decoded(raw: bytes, file: Path, encoding: str, *others: str) -> str:
    """Text in `encoding`, or, where it is not, in the first of the `others` that it is in.

    Raises:
        ValueError: it is in neither, there is no such encoding, or it holds a NUL.
    """
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")  # a mark at the beginning, as Windows writes it, is no text
    except LookupError:
        if others:
            return decoded(raw, file, *others)
        raise ValueError(f"no encoding '{encoding}'; such as utf-8, latin-1, cp1252") from None
    except UnicodeDecodeError as error:
        if others:
            return decoded(raw, file, *others)
        other, of_iconv = ("utf-16", "utf-16") if raw.startswith(UTF_16) else ("latin-1", "latin1")
        raise ValueError(
            f"{file} is not {encoding}: byte {error.start} is {error.object[error.start]:#04x}; "
            f"name its encoding, such as {other}, or convert it: "
            f"iconv -f {of_iconv} -t utf-8 {shlex.quote(str(file))} > converted{file.suffix}"
        ) from None
    if "\0" in text:
        raise ValueError(f"{file} is not text: character {text.index(chr(0))} is a NUL")
    return text
