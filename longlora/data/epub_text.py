"""An EPUB as plain text: its chapters, which are web pages, in their order."""

import io
import lzma
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,  # by bz2
    EOFError,
    NotImplementedError,
    LookupError,  # what a book names and does not hold, an encoding that there is not
    ElementTree.ParseError,
)


def epub_text(raw: bytes, file: Path, *, largest: int, page: Callable[[bytes, Path], str]) -> str:
    """The chapters of an EPUB in the order of its spine (EPUB 3.3, section 5), if it unpacks to at most `largest` bytes; `page`
    reads each, which comes from a place in `file`.

    Raises:
        ValueError: it is larger, encrypted, or no EPUB; or as `page`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            if sum(part.file_size for part in book.infolist()) > largest:
                raise ValueError(f"{file} unpacks to more than {largest:,} bytes")
            if any(part.flag_bits & 1 for part in book.infolist()):
                raise ValueError(f"{file} is encrypted: save a copy without its password first")
            chapters = list(spine(book))
            if locked(book).intersection(chapters):
                raise ValueError(f"{file} is encrypted: its chapters open with a licence (DRM) only")
            texts = (page(book.read(chapter), file / chapter).strip() for chapter in chapters)
            return "\n\n".join(text for text in texts if text) + "\n"
    except UNREADABLE as error:
        raise ValueError(f"{file} is not an EPUB: {str(error) or 'it ends too soon'}") from None


def spine(book: zipfile.ZipFile) -> Iterator[str]:
    """Paths of the chapters inside the archive."""
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    package = next((e.attrib["full-path"] for e in container.iter() if e.tag.endswith("}rootfile")), None)
    if package is None:
        raise zipfile.BadZipFile("META-INF/container.xml names no rootfile")
    root = ElementTree.fromstring(book.read(package))
    items = {e.attrib["id"]: e.attrib for e in root.iter() if e.tag.endswith("}item")}
    folder = package.rpartition("/")[0]
    for reference in (e for e in root.iter() if e.tag.endswith("}itemref")):
        item = items[reference.attrib["idref"]]
        if not item.get("media-type", "").startswith("image/"):  # a page of a picture book
            yield posixpath.normpath(posixpath.join(folder, unquote(item["href"])))


def locked(book: zipfile.ZipFile) -> set[str]:
    """Paths of what is encrypted (EPUB 3.3, section 4.2.6.3.2): chapters under DRM, or fonts alone."""
    if "META-INF/encryption.xml" not in book.namelist():
        return set()
    said = ElementTree.fromstring(book.read("META-INF/encryption.xml"))
    return {unquote(e.attrib["URI"]) for e in said.iter() if e.tag.endswith("}CipherReference")}
