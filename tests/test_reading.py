"""Documents of every format become the text that a reader sees, or one line that says why not."""

import zipfile

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from longlora.data import reading
from longlora.data.reading import read_document, read_documents

HTML = """<!doctype html><html><head><title>No</title><style>p {}</style></head><body>
<h1>The  <b>first</b>
part</h1><p>One line
of text,<br>and another.</p><!-- no --><script>no()</script>
<ul><li>item <i>one</i></li><li>item two</li></ul><table><tr><td>a</td><td>b</td></tr></table>
<pre>kept   as
it is</pre><h3>Then</h3>Caf&eacute; &lt;end&gt;</body></html>"""
SEEN = """# The first part

One line of text,
and another.

item one

item two

a b

kept   as
it is

### Then

Café <end>
"""


def pdf(file, *pages, password=None):
    """A PDF with a line of Helvetica on each page."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject(f"/{k}"): NameObject(f"/{v}")
            for k, v in [("Type", "Font"), ("Subtype", "Type1"), ("BaseFont", "Helvetica")]
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Contents")] = writer._add_object(stream)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): writer._add_object(font)})}
        )
    if password:
        writer.encrypt(password)
    writer.write(file)
    return file


def epub(file, *chapters):
    with zipfile.ZipFile(file, "w") as book:
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="text/book.opf"/></rootfiles></container>',
        )
        items = "".join(f'<item id="c{i}" href="c{i}.xhtml"/>' for i in range(len(chapters)))
        order = "".join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(chapters))))
        book.writestr(
            "text/book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>',
        )
        for i, chapter in enumerate(chapters):
            book.writestr(f"text/c{i}.xhtml", chapter)
    return file


def test_html_is_read_as_it_is_seen(tmp_path):
    (tmp_path / "page.html").write_text(HTML, encoding="utf-8")
    assert read_document(tmp_path / "page.html").text == SEEN


def test_an_epub_is_its_chapters_in_the_order_of_its_spine(tmp_path):
    book = epub(tmp_path / "book.epub", "<h2>Last</h2><p>x</p>", "<h2>First</h2><p>é</p>")
    assert read_document(book).text == "## First\n\né\n\n## Last\n\nx\n"


def test_a_pdf_remembers_its_pages(tmp_path):
    document = read_document(pdf(tmp_path / "paper.pdf", "First page.", "Second page."))
    assert document.text == "First page.\n\nSecond page.\n\n"
    assert [document.page(document.text.index(word)) for word in ("First", "Second")] == [1, 2]
    assert document.line(document.text.index("Second")) == 3


def test_an_encrypted_pdf_is_read_only_without_a_password_to_ask_for(tmp_path):
    assert PdfReader(pdf(tmp_path / "locked.pdf", "Secret.", password="x")).is_encrypted
    with pytest.raises(ValueError, match="locked.pdf is encrypted"):
        read_document(tmp_path / "locked.pdf")


def test_plain_text_loses_only_its_mark_and_its_carriage_returns(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffNaïve\r\ntext\r\n".encode())
    (tmp_path / "b.md").write_bytes("café".encode("latin-1"))
    assert read_document(tmp_path / "a.txt").text == "Naïve\ntext\n"
    assert read_document(tmp_path / "b.md", encoding="latin-1").text == "café"


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "a.txt is not utf-8: byte 3 is 0xe9; name its encoding"),
        ("a.txt", b"ab\0c", "not text: character 2 is a NUL"),
        ("a.docx", b"PK", "not from '.docx'"),
        ("a.pdf", b"%PDF-1.4 nothing", "not a PDF that can be read"),
        ("a.epub", b"PK", "not an EPUB"),
        ("a.html", b"<script>x</script>", "holds no text"),
        ("a.txt", b"x" * 101, "has 101 bytes, and a document at most 100"),
    ],
)
def test_what_can_not_be_read_says_why(tmp_path, monkeypatch, name, raw, said):
    monkeypatch.setattr(reading, "LARGEST", 100)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        read_document(tmp_path / name)


def test_a_scan_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no text: a scan, perhaps"):
        read_document(pdf(tmp_path / "scan.pdf", "", ""))


def test_a_folder_is_its_documents_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "d.jpg"):
        (tmp_path / name).write_text(name)
    assert [d.name for d in read_documents(tmp_path)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no document at"):
        read_documents(tmp_path / "nowhere")
