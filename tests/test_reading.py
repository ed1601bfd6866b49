"""Documents of every format become the text that a reader sees, or one line that says why not."""

import os
import posixpath
import zipfile

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from longlora.data import reading
from longlora.data.html_text import html_text, without_open_marks
from longlora.data.reading import located, read_document, read_documents

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

```
kept   as
it is
```

### Then

Café <end>
"""


def pdf(file, *pages, password=None, algorithm=None):
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
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
    writer.write(file)
    return file


def epub(file, *chapters, name="c{}.xhtml", href="c{}.xhtml", encrypted=()):
    with zipfile.ZipFile(file, "w") as book:
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="text/book.opf"/></rootfiles></container>',
        )
        items = "".join(f'<item id="c{i}" href="{href.format(i)}"/>' for i in range(len(chapters)))
        order = "".join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(chapters))))
        book.writestr(
            "text/book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>',
        )
        for i, chapter in enumerate(chapters):
            book.writestr(posixpath.normpath(f"text/{name.format(i)}"), chapter)
        if encrypted:
            parts = "".join(f'<CipherData><CipherReference URI="{uri}"/></CipherData>' for uri in encrypted)
            said = f'<encryption xmlns="http://www.w3.org/2001/04/xmlenc#">{parts}</encryption>'
            book.writestr("META-INF/encryption.xml", said)
    return file


def test_html_is_read_as_it_is_seen(tmp_path):
    (tmp_path / "page.html").write_text(HTML, encoding="utf-8")
    assert read_document(tmp_path / "page.html").text == SEEN


def test_the_number_of_a_note_and_an_exponent_are_no_digits_of_what_they_stand_at():
    page = (
        "<p>In 1755<sup><a href='#n'>1</a></sup> some 30,000<sup>2, 3</sup> died<sup>[4]</sup> by 10<sup>-17</sup> J, "
        "the 5<sup>th</sup>.</p>"
    )
    assert html_text(page) == "In 1755^1 some 30,000^2, 3 died[4] by 10^-17 J, the 5th.\n"


def test_a_raised_number_is_marked_once_and_no_fraction_is(tmp_path):
    page = (
        "<p>then<sup>\n <a>7</a>\n</sup> x<sup><sup>2</sup></sup> 10<sup>-3.5</sup> "
        "3<sup>1</sup>/<sub>2</sub> <sup>3</sup>&frasl;<sub>8</sub></p>"
    )
    assert html_text(page) == "then^7 x^2 10^-3.5 31/2 3\u20448\n"


def test_code_and_tables_of_a_page_are_those_of_markdown(tmp_path):
    (tmp_path / "page.html").write_text(
        "<nav><a href=x>Home</a></nav><h2>Chapter 1<br/><div>The sluice</div><a>\u00b6</a></h2><p>Wa&shy;ter</p>"
        "<table><caption>Fees</caption><tr><th><p>Boat</p></th><th>Fee</th></tr><tr><td>Ketch</td><td>9 or\n10</td></tr></table>"
        "<pre><code>def fee():\n    # ``` is a fence\n\n\n    return 9</code></pre>"
        "<p><code>fee --now</code></p><p>Call <code>fee</code> first.</p>"
        "<table><tr><td><table><tr><td>inner</td></tr></table></td><td>beside</td></tr><tr><td>a</td><td>b</td></tr></table>"
        "<table><tr><td>1</td><td><p>Said here.</p><p>Said there.</p></td></tr><tr><td>2</td><td>x</td></tr></table>"
    )
    assert read_document(tmp_path / "page.html").text == (
        "## Chapter 1 The sluice\n\nWater\n\nFees\n\n| Boat | Fee |\n| --- | --- |\n| Ketch | 9 or 10 |\n\n"
        "````\ndef fee():\n    # ``` is a fence\n\n\n    return 9\n````\n\n```\nfee --now\n```\n\nCall fee first.\n\n"
        "inner\n\nbeside\n\na b\n\n1\n\nSaid here.\n\nSaid there.\n\n2 x\n"
    )
    (tmp_path / "mail.html").write_text("<h1>Mail</h1><pre>Dear all,\n\n" + "the sluice is open again. " * 9 + "</pre>")
    assert "```" not in read_document(tmp_path / "mail.html").text  # a page of plain text


def test_a_page_may_leave_out_ends(tmp_path):
    (tmp_path / "page.html").write_text(
        "<html><head><title>No</title><style>p {}</style><body><p>Seen<p>x<sup>2</sup>"
        "<math><semantics><mi>y</mi><annotation>\\bar y</annotation></semantics></math>"
        "<table><tr><td>one<td>two<tr><td>three<td>four</table></html>"
    )
    table = "| one | two |\n| --- | --- |\n| three | four |\n"
    assert read_document(tmp_path / "page.html").text == f"Seen\n\nx^2y\n\n{table}"


def test_a_page_that_leaves_out_its_ends_takes_no_longer():
    rows = "<tr><td>a<td>b" * 2000
    assert html_text(f"<table>{rows}</table>").count("| a | b |") == 2000
    assert html_text("<p>words" * 4000).count("words\n") == 4000
    mixed = "<tr><td><div>a<td><div>b" * 60
    assert html_text(f"<table>{mixed}</table>").split() == ["a", "b"] * 60


def test_a_picture_in_the_spine_of_an_epub_is_no_text(tmp_path):
    href = 'c{}.xhtml" media-type="image/jpeg'
    with pytest.raises(ValueError, match="holds no text"):
        read_document(epub(tmp_path / "a.epub", "\xff\xd8 JFIF", href=href))


def test_an_epub_is_its_chapters_in_the_order_of_its_spine(tmp_path):
    book = epub(tmp_path / "book.epub", "<h2>Last</h2><p>x</p>", "<h2>First</h2><p>é</p>")
    assert read_document(book).text == "## First\n\né\n\n## Last\n\nx\n"


@pytest.mark.parametrize(
    ("name", "href"),
    [("chapter 1{}.xhtml", "chapter%201{}.xhtml"), ("é{}.xhtml", "%C3%A9{}.xhtml"), ("../c{}", "../c{}")],
)
def test_an_epub_names_its_chapters_as_urls(tmp_path, name, href):
    book = epub(tmp_path / "book.epub", "<p>x</p>", name=name, href=href)
    assert read_document(book).text == "x\n"


def test_an_epub_whose_chapters_are_encrypted_is_refused_and_one_whose_fonts_are_is_read(tmp_path):
    fonts = epub(tmp_path / "fonts.epub", "<p>x</p>", encrypted=["text/f.otf"])
    assert read_document(fonts).text == "x\n"
    book = epub(
        tmp_path / "lcp.epub", "\x03\x9f\x00", name="c {}.xhtml", href="c%20{}.xhtml", encrypted=["text/c%200.xhtml"]
    )
    with pytest.raises(ValueError, match=r"lcp.epub is encrypted: its chapters open with a licence \(DRM\) only$"):
        read_document(book)


def test_an_epub_with_a_password_is_one_line(tmp_path):
    raw = bytearray(epub(tmp_path / "book.epub", "<p>x</p>").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag that says so, of every part
        place = raw.find(mark)
        while place >= 0:
            raw[place + at] |= 1
            place = raw.find(mark, place + 1)
    (tmp_path / "book.epub").write_bytes(raw)
    with pytest.raises(ValueError, match="book.epub is encrypted: save a copy without its password first$"):
        read_document(tmp_path / "book.epub")


def test_an_epub_in_an_encoding_that_there_is_not_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "book.epub", "w") as book:
        book.writestr("META-INF/container.xml", '<?xml version="1.0" encoding="foo"?><container/>')
    with pytest.raises(ValueError, match="book.epub is not an EPUB: unknown encoding: foo$"):
        read_document(tmp_path / "book.epub")


def test_an_epub_without_a_rootfile_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "book.epub", "w") as book:
        book.writestr("META-INF/container.xml", "<container/>")
    with pytest.raises(ValueError, match="book.epub is not an EPUB: .*names no rootfile"):
        read_document(tmp_path / "book.epub")


def test_an_epub_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 5000)
    book = epub(tmp_path / "bomb.epub", "<p>" + "x" * 3000 + "</p>")
    with zipfile.ZipFile(book, "a", zipfile.ZIP_DEFLATED) as more:
        more.writestr("zeros", bytes(100_000))
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    assert book.stat().st_size < 5000
    with pytest.raises(ValueError, match="bomb.epub unpacks to more than 5,000 bytes$"):
        read_document(book)


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_a_pdf_that_only_its_owner_may_change_is_read(tmp_path, algorithm):
    locked = pdf(tmp_path / "a.pdf", "Read me.", password="", algorithm=algorithm)
    assert PdfReader(locked).is_encrypted and read_document(locked).text.strip() == "Read me."
    with pytest.raises(ValueError, match="b.pdf is encrypted: save a copy"):
        read_document(pdf(tmp_path / "b.pdf", "Secret.", password="x", algorithm=algorithm))


@pytest.mark.parametrize(
    ("said", "raw", "text"),
    [
        ("iso-8859-1", b"caf\xe9 \x93so\x94", "café “so”"),  # as browsers do, the signs of cp1252 too
        ("windows-1251", "да".encode("cp1251"), "да"),
        ("Shift_JIS", "大阪".encode("shift_jis"), "大阪"),
        ("iso-8859-1", "café".encode(), "café"),  # a page that was saved anew, and says what it was
    ],
)
def test_a_page_that_is_not_utf8_may_say_its_own_encoding(tmp_path, said, raw, text):
    (tmp_path / "a.html").write_bytes(f'<meta charset="{said}"><p>'.encode() + raw)
    assert read_document(tmp_path / "a.html").text == f"{text}\n"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
def test_what_a_page_says_of_its_encoding_goes_before_what_is_usual(tmp_path, encoding):
    for said in ("utf-8", "utf-16"):  # which in a page that is ASCII is UTF-8
        (tmp_path / "a.html").write_bytes(f'<meta charset="{said}"><p>The Brontë sisters.'.encode())
        assert read_document(tmp_path / "a.html", encoding=encoding).text == "The Brontë sisters.\n"
    (tmp_path / "a.html").write_bytes("\ufeff<p>The Brontë sisters.".encode("utf-16-le"))
    assert read_document(tmp_path / "a.html", encoding=encoding).text == "The Brontë sisters.\n"
    (tmp_path / "a.html").write_bytes('<meta charset="koi9"><p>Brontë'.encode("cp1252"))
    if encoding != "utf-8":
        assert read_document(tmp_path / "a.html", encoding=encoding).text == "Brontë\n"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    "raw",
    [
        "<p>The Brontë sisters.</p>".encode(),  # UTF-8, as an EPUB is if it says nothing
        "\ufeff<p>The Brontë sisters.</p>".encode("utf-16-be"),
        '<?xml version="1.0" encoding="iso-8859-1"?><html><p>The Brontë sisters.</p></html>'.encode("latin-1"),
    ],
)
def test_a_chapter_is_utf8_unless_it_says_otherwise(tmp_path, raw, encoding):
    assert read_document(epub(tmp_path / "a.epub", raw), encoding=encoding).text == "The Brontë sisters.\n"


def test_a_chapter_in_no_encoding_that_it_may_have_is_named(tmp_path):
    book = epub(tmp_path / "a.epub", b"<p>caf\xe9")
    with pytest.raises(ValueError, match=r"a.epub/text/c0.xhtml is not utf-8: byte 6 is 0xe9; name its encoding"):
        read_document(book)
    assert read_document(book, encoding="latin-1").text == "café\n"


def test_an_encoding_that_a_page_has_not_is_one_line(tmp_path):
    for said, why in (("koi9", "no encoding 'koi9'"), ("ascii", "a.html is not ascii: byte 28 is 0xe9")):
        (tmp_path / "a.html").write_bytes(f'<meta charset="{said}"><p>'.encode() + b"caf\xe9")
        with pytest.raises(ValueError, match=why):
            read_document(tmp_path / "a.html")
    (tmp_path / "a.html").write_bytes(b'<meta charset="ascii"><p>caf\xe9')
    assert read_document(tmp_path / "a.html", encoding="latin-1").text == "café\n"


def test_a_pdf_remembers_its_pages(tmp_path):
    document = read_document(pdf(tmp_path / "paper.pdf", "First page.", "Second page."))
    assert document.text == "First page.\n\nSecond page.\n\n"
    assert [document.page(document.text.index(word)) for word in ("First", "Second")] == [1, 2]
    assert document.line(document.text.index("Second")) == 3


def test_what_runs_through_the_pages_of_a_pdf_is_no_text(tmp_path):
    line = ") Tj 0 -20 Td ("
    texts = ["It began in", "the town of", "Oxley, and it", "ended there.", "The end"]
    pages = [line.join(["Annals, volume 12", text, f"Page {n} of 5"]) for n, text in enumerate(texts, start=1)]
    document = read_document(pdf(tmp_path / "annals.pdf", *pages))
    assert document.text == "It began in\nthe town of\n\nOxley, and it\nended there.\n\nThe end\n\n"
    assert [document.page(document.text.index(text)) for text in texts] == [1, 2, 3, 4, 5]

    twice = pdf(tmp_path / "two.pdf", pages[0], pages[1], *texts)
    assert read_document(twice).text.count("Annals") == 2  # of seven pages
    assert (
        read_document(pdf(tmp_path / "alone.pdf", *["Page 1", "Page 2", "Page 3"])).text
        == "Page 1\n\nPage 2\n\nPage 3\n\n"
    )
    rows = [line.join([f"Year {n} was good", f"{n} 12 7"]) for n in range(4)]
    assert "2 12 7" in read_document(pdf(tmp_path / "rows.pdf", *rows)).text


def test_what_a_pdf_parts_is_put_together_and_what_it_runs_together_is_parted(tmp_path):
    rows = [
        "2 The sluice",
        "The sluice of Oxley is a work of Amos Field, the engin-",
        "eer, who is well known. An engineer opens it, a well-",
        "known one, when water is above the second mark, as",
        "Amos Field said.",
        "Gate Width Mark",
        "Lower 14 2",
        "It is closed at night, and the key lies with",
    ]
    document = read_document(pdf(tmp_path / "a.pdf", ") Tj 0 -20 Td (".join(rows), "the \\256shermen of Oxley."))
    assert document.text == (
        "2 The sluice\n\nThe sluice of Oxley is a work of Amos Field, the engineer,\nwho is well known. An engineer opens it, "
        "a well-\nknown one, when water is above the second mark, as\nAmos Field said.\nGate Width Mark\n\nLower 14 2\n\n"
        "It is closed at night, and the key lies with\nthe fishermen of Oxley.\n\n"
    )
    assert document.page(document.text.index("the fishermen")) == 2


def test_characters_that_a_pdf_has_in_halves_are_whole(tmp_path):
    pdf(tmp_path / "a.pdf", "xA AB C")
    writer = PdfWriter(clone_from=tmp_path / "a.pdf")
    table = DecodedStreamObject()
    table.set_data(
        b"begincmap 1 begincodespacerange <00> <ff> endcodespacerange "
        b"3 beginbfchar <41> <D835> <42> <DC00> <43> <D835DC01> endbfchar endcmap"
    )
    writer.pages[0]["/Resources"]["/Font"]["/F1"].get_object()[NameObject("/ToUnicode")] = writer._add_object(table)
    writer.write(tmp_path / "b.pdf")
    assert read_document(tmp_path / "b.pdf").text.strip() == "x\ufffd \U0001d400 \U0001d401"


def test_a_broken_pdf_is_said_once(tmp_path, caplog):
    (tmp_path / "a.pdf").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(ValueError, match="a.pdf is not a PDF that can be read"):
        read_document(tmp_path / "a.pdf")
    assert not caplog.records


def test_a_pdf_and_an_epub_with_other_things_than_stand_there_are_one_line_each(tmp_path):
    file = pdf(tmp_path / "a.pdf", "Read me.")
    file.write_bytes(file.read_bytes().replace(b"/F1", b"[1]"))
    with pytest.raises(ValueError, match="a.pdf is not a PDF that can be read: unhashable type"):
        read_document(file)
    book = epub(tmp_path / "a.epub", "Some text.")
    size, other = len(b"Some text.").to_bytes(4, "little"), (10**6).to_bytes(4, "little")
    book.write_bytes(book.read_bytes().replace(size * 2, other * 2))
    with pytest.raises(ValueError, match="a.epub is not an EPUB: (it ends too soon|Overlapped entries)"):
        read_document(book)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_epub_that_is_damaged_is_one_line(tmp_path, kind):
    with zipfile.ZipFile(epub(tmp_path / "a.epub")) as book:
        parts = {part.filename: book.read(part) for part in book.infolist()}
    with zipfile.ZipFile(tmp_path / "a.epub", "w", kind) as book:
        for name, content in parts.items():
            book.writestr(name, content)
    raw = bytearray((tmp_path / "a.epub").read_bytes())
    at = 30 + len("META-INF/container.xml")  # behind the first part's header
    raw[at + 9 : at + 40] = b"\xff" * 31
    (tmp_path / "a.epub").write_bytes(raw)
    with pytest.raises(ValueError, match="a.epub is not an EPUB: "):
        read_document(tmp_path / "a.epub")


def test_an_encrypted_pdf_is_read_only_without_a_password_to_ask_for(tmp_path):
    assert PdfReader(pdf(tmp_path / "locked.pdf", "Secret.", password="x")).is_encrypted
    with pytest.raises(ValueError, match="locked.pdf is encrypted"):
        read_document(tmp_path / "locked.pdf")


def test_plain_text_loses_only_its_mark_and_its_carriage_returns(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffNaïve\r\ntext\r\n".encode())
    (tmp_path / "b.md").write_bytes("café".encode("latin-1"))
    for encoding in ("utf-8", "UTF-8", "utf8", "utf-8-sig"):
        assert read_document(tmp_path / "a.txt", encoding=encoding).text == "Naïve\ntext\n"
    assert read_document(tmp_path / "b.md", encoding="latin-1").text == "café"


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"", "holds no text"),
        (
            "a.txt",
            b"caf\xe9",
            "a.txt is not utf-8: byte 3 is 0xe9; name its encoding, such as latin-1, or convert it: iconv -f",
        ),
        (
            "a.txt",
            "Größe".encode("utf-16"),
            "not utf-8: byte 0 is .*; name its encoding, such as utf-16, or convert it: iconv -f utf-16 -t",
        ),
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


def test_a_name_that_is_empty_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="no file, folder or installed package ''"):
        located("")


def test_a_scan_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no text: a scan, perhaps"):
        read_document(pdf(tmp_path / "scan.pdf", "", ""))


def test_a_name_that_is_not_utf8_is_one_that_can_be_written(tmp_path):
    for folder in ("", "sub"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    assert read_documents(tmp_path / "sub")[0].name == "caf\ufffd"
    assert [d.name for d in read_documents(tmp_path)] == ["caf\ufffd.txt", "sub/caf\ufffd.txt"]


def test_a_folder_is_its_documents_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "d.jpg", ".venv/e.txt", "._b.txt"):
        (tmp_path / name).write_text(name)
    assert [d.name for d in read_documents(tmp_path)] == ["a", "b", "c"]
    for name in ("sub/a.md", "a.txt"):
        (tmp_path / name).write_text(name)
    assert [d.name for d in read_documents(tmp_path)] == ["a.md", "a.txt", "b", "sub/a.md", "c"]
    with pytest.raises(ValueError, match="no document at"):
        read_documents(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nav", "button"])
def test_what_is_never_closed_takes_no_page_with_it(tmp_path, name):
    page = f"<p>Before.</p><{name}>Home<p>The text.</p><p>More.</p>"
    (tmp_path / "a.html").write_text(f"<html><body>{page}</body></html>")
    assert read_document(tmp_path / "a.html").text == "Before.\n\nHome\n\nThe text.\n\nMore.\n"
    (tmp_path / "a.html").write_text(f"<html><body><{name}/>{page.replace('Home', f'Home</{name}>')}</body></html>")
    assert read_document(tmp_path / "a.html").text == "Before.\n\nThe text.\n\nMore.\n"


@pytest.mark.parametrize("mark", ["<!-- note", "<![CDATA[ note"])
def test_a_comment_that_is_never_closed_is_text_and_costs_no_look_through_the_whole_page(mark):
    assert html_text(f"<p>a</p>{mark} <p>b</p>") == f"a\n\n{mark}\n\nb\n"
    assert html_text(f"<!-- c --><p>a{mark}</p>") == f"a{mark}\n"
    rest = without_open_marks(f"<!-- c -->{f'{mark} <b>x</b> ' * 16_000}").removeprefix("<!-- c -->")
    assert "<!" not in rest and html_text(rest).count(mark) == 16_000


def test_a_mark_as_word_writes_it_ends_where_its_tag_does():
    assert (
        html_text("<p>a<![endif]-->b</p><p>c<![if !IE]>d<![endif]>e<![some[x]]>f</p><p>g]></p>")
        == "ab\n\ncdef\n\ng]>\n"
    )
