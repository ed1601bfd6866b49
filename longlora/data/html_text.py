"""A web page as plain text, by Beautiful Soup and lxml, which knows whose ends a page may leave out.

Headings, code and tables are written as Markdown has them.
"""

import re

from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag

from longlora.data.sentences import FENCED

UNREAD = ["script", "style", "template", "noscript", "title", "nav", "button", "select", "annotation"]
"""What is no text, says it a second time (a formula's source), or leads through the pages and says nothing of them. Not `head`,
whose end a page may leave out: what it holds is among these."""
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
RAISED = re.compile(r"\s*([-\u2212]?\d[\d,.\s\u2013-]*?)\s*")
"""What only its height keeps apart from the digits before it: a note's number, an exponent."""
BAR = re.compile(r"\s*[/\u2044]")
"""What stands behind the upper number of a fraction."""
CELL = 400
"""Characters of a table's cell, at most; a longer one is text that a table only arranges."""
LISTING = 0.8
"""The share of a page that is no code any more, though it stands in `pre`: a mail, an RFC."""


def html_text(html: str) -> str:
    """The text that a reader sees, a blank line between blocks; headings, code and tables in Markdown."""
    source = without_open_marks(html)
    soup = BeautifulSoup(source, "lxml")
    for tag in soup([name for name in UNREAD if closed(name, source)]):
        tag.decompose()
    for string in soup.find_all(string=True):
        if type(string) is not NavigableString:  # a comment, a doctype
            string.extract()
        elif all(tag.name != "pre" for tag in string.parents):  # find_parent takes ten times as long, deep inside
            plain = re.sub(r"\s+", " ", string.replace("\u00ad", ""))  # soft hyphens are not seen
            if plain != string:  # one that is replaced is looked for among all that stand before it
                string.replace_with(plain)
    tables = [t for t in soup("table") if not t.find(["table", "pre", HEADINGS])]
    for tag in soup("sup"):
        number = RAISED.fullmatch(tag.get_text())
        if number and not tag.find_parent("sup") and not BAR.match(str(tag.next_sibling or "")):
            tag.string = f"^{number[1]}"
    for tag in soup("br"):
        tag.replace_with("\n")
    for tag in listings(soup):
        tag.replace_with(fenced(tag.get_text()))
    for tag in soup(["td", "th"]):
        tag.insert_before(" ")  # not behind it: its end may be left out, and then the next one is inside of it
    for tag in soup(BLOCKS):
        # inside: to put it before the tag, that is looked for among all of a long page's paragraphs
        tag.insert(0, "\n\n")
        tag.append("\n\n")
    for tag in soup(HEADINGS):
        heading = " ".join(tag.get_text().split()).rstrip(" ¶")  # Sphinx's link to the heading
        tag.replace_with(f"\n\n{'#' * int(tag.name[1])} {heading}\n\n" if heading else "")
    for table in tables:
        if rows := cells(table):
            title = table.find("caption")
            table.replace_with(f"\n\n{title.get_text() if title else ''}\n\n{ruled(rows)}\n\n")
    return tidied(soup.get_text())


def without_open_marks(source: str) -> str:
    """A comment, or a section of XML, that is never closed becomes text: the parser would look for the end of each through all of
    the rest. Any other `<![`, as Word writes them, ends with its tag, as in browsers; some are an error to the parser."""
    source = re.sub(r"<!\[(?!CDATA\[)", "<!?[", source, flags=re.I)
    for opening, closing in (("<!--", r"--\s*>"), ("<![", r"\]\s*\]\s*>")):
        last = max((end.start() for end in re.finditer(closing, source)), default=0)
        source = source[:last] + source[last:].replace(opening, f"&lt;{opening[1:]}")
    return source


def closed(name: str, source: str) -> bool:
    """Whether tags of this name are closed as often as opened. One that is not holds the page's rest, which is no part of it."""
    if name in ("script", "style", "title"):  # to the page's end no tag is read in them, by browsers neither
        return True
    opened = len(re.findall(rf"<{name}\b(?![^<>]*/>)", source, re.I))
    return opened <= len(re.findall(rf"</{name}\b", source, re.I))


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
    """The rows of a table of data; none where it only arranges text: it has one row or column, or a cell with several blocks; nor
    where its tags are so mixed up that cells and rows stand inside of each other."""
    if any(part.find(["td", "th", "tr"]) for part in table(["td", "th"])) or any(row.find("tr") for row in table("tr")):
        return []
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
