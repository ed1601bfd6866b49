"""A PDF as plain text, by pypdf: lines that run through its pages are left out, and sentences go on from one page to the next."""

import io
import logging
import re
import statistics
import unicodedata
from collections import Counter
from pathlib import Path

from pypdf import PdfReader

logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it cannot read it raises, and that is said in our one line
RUNNING = 3
"""Lines at the head or foot of a PDF's page, at most, that are looked at for what runs through its pages."""
LIGATURE = re.compile("[\ufb00-\ufb06]")
"""Signs that a PDF's font has for "fi" and the like, and that no word is spelt with."""
PARTED = re.compile(r"(?P<left>[^\W\d_]+)(?P<mark>[-\u00ad])\n(?P<right>[^\W\d_]+)(?P<rest>\S*)\s?")
"""A word at the end of a PDF's line that goes on in the next one."""
STOPPED = re.compile(r"[.!?:;,\u2026\u3002]['\"\u2019\u201d)\]]*$|[-\u2013\u2014(]$")
"""The end of a line that is followed by a new sentence, or by more of its own."""
SHORT = 0.75
"""Of the page's median line: a line of a PDF that is shorter may end a paragraph or be a heading."""


def pdf_text(raw: bytes, file: Path) -> tuple[str, tuple[int, ...]]:
    """The text of a PDF's pages, and where each begins.

    Raises:
        ValueError: it is encrypted, or no PDF.
    """
    try:
        reader = PdfReader(io.BytesIO(raw))
        locked = reader.is_encrypted and not reader.decrypt("")
        raw_pages = [] if locked else [joined(page.extract_text()) for page in reader.pages]
    except (
        Exception
    ) as error:  # pypdf meets a broken file with PyPdfError, but with TypeError, AssertionError and others, too
        raise ValueError(f"{file} is not a PDF that can be read: {str(error) or type(error).__name__}") from None
    if locked:
        raise ValueError(f"{file} is encrypted: save a copy without its password first")
    texts = [LIGATURE.sub(letters, page).strip() for page in raw_pages]
    texts = [paragraphs(page) for page in unhyphenated(without_running_lines(texts))]
    starts, text = [], ""
    for page, following in zip(texts, [*texts[1:], ""], strict=True):
        starts.append(len(text))
        text += page + ("\n" if goes_on(page, following) else "\n\n")
    return text, tuple(starts)


def joined(text: str) -> str:
    """The text with characters whole that a PDF's font has in two halves; a half alone, which no file takes, is U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
