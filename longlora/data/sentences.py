"""A text's sentences and headings, as places in it. Rules, no model: the same text gives the same places everywhere.

The rules are cautious: after an abbreviation or an initial the sentence goes on, so a place may hold two sentences, and
rarely half of one. Where Markdown has code between fences, a table, a comment or front matter, each line is a place of its own,
and no prose.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from longlora.data.words import before_mark, inside_word, terms

NOTES = r"\d+(?:, ?\d+|[-\u2013]\d+)*"
STOP = (
    r"[.!?\u0589\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4]"  # also Armenian, Arabic, Urdu, Hindi, Burmese, Ethiopic, Khmer
    rf"(?:['\"\u2019\u201d)\]]|\[\^?{NOTES}\]|[,\u2013-](?=\[)|\^{NOTES})*"
)
"""A full stop, with the closing quotes and the numbers of notes behind it."""
BORDER = re.compile(
    rf"(?:{STOP})?((?<!\s)\s*\n[ \t]*(?:[-*+][ \t]+|(?=\d{{1,2}}[.)][ \t])))(?=\S)"  # an item of a Markdown list
    rf"|{STOP}(?P<space>\s+)(?=\S)"
    r"|[\u3002\uff01\uff1f][\u300d\u300f\u2019\u201d\uff09]*()"  # Chinese and Japanese stops, without a space
    r"|((?<!\s)\s*\n\s*\n\s*)"  # a blank line
)
"""White space is looked through from where it begins alone: from each of its characters, a long run would take minutes."""
ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Gen|Col|Capt|Lieut|Lt|Hon|Rev|St|No|Nos|Art|Sec|Messrs|Prof|Jr|Sr|Gov|Sen|Rep|vs?|etc|[Cc]f|viz"
    r"|Inc|Corp|Co|Ltd|Bros|al|[A-Z])|\b[A-Za-z]\.[A-Za-z])\.$"
)
COUNTED = re.compile(
    r"\b(?:nos?|arts?|secs?|paras?|chs?|cl|pts?|pp?|vols?|figs?|eqs?|nn?|c|ca|app|supp|stat"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)
"""What stands before a number: of a page, a section, a day."""
HEADING = re.compile(r"^#{1,6} ++(.*\S)[ #]*$", re.MULTILINE)
UNDERLINED = re.compile(
    r"(?:\A|(?<=\n\n))(?P<heading>[^\s#|=~-](?:.*[^ \t\n])?)[ \t]*\n(?P<line>([=~-])\3{2,})[ \t]*$", re.MULTILINE
)
"""A heading of Markdown or reStructuredText that has a line below it, if that is as long: dashes may also part paragraphs."""
FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[^`\n]*\n(?P<lines>.*?)^ {0,3}\1[`~]*", re.MULTILINE | re.DOTALL)
"""Markdown's code between fences, where what looks like a heading is mostly a comment."""
TABLE = re.compile(
    r"^(?P<lines>(?=.*\|).*\n[ \t]*(?:\|[ \t:|]*-|:?-+:?[ \t]*\|)[ \t:|-]*$(?:\n(?=.*\|).*)*)", re.MULTILINE
)
"""A Markdown table: a line of names, one of dashes, rows. All have a bar, if not at the beginning."""
FRONT = re.compile(r"\A---[ \t]*\n(?P<lines>(?:(?:[\w.-]+:|[ \t]|- |#).*\n)+)---[ \t]*$", re.MULTILINE)
"""A Markdown page's own data, as YAML."""
COMMENT = re.compile(r"^(?P<lines>[ \t]*<!--.*?-->)", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^[ \t]*(?P<line>\S.*)$", re.MULTILINE)
FEWEST = 3
"""Words of a passage that is hardly in a text by chance."""
RULED = re.compile(r"[\s:|-]*")
"""What says nothing: the dashes below a table's names."""


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class Part(NamedTuple):
    """What stands under one heading, the heading left out."""

    heading: str
    start: int
    end: int


def sentences(text: str) -> list[Span]:
    """In order, without the white space around them, each line of code and each row of a table by itself; headings are none."""
    return sorted([*prose(text), *(line for aside in asides(text) for line in lines(text, aside))])


def prose(text: str) -> list[Span]:
    """The sentences that stand in no code and no table: what may be asked about as a sentence, and where a text can be cut."""
    apart = sorted(stripped(text, *found.span()) for found in (*headings(text), *asides(text)))
    borders = [0, *(edge for span in apart for edge in span), len(text)]
    spans = []
    for first, last in zip(borders[::2], borders[1::2], strict=True):
        start = first
        for border in BORDER.finditer(text, first, last):
            if ends_sentence(border, text):
                spans.append(stripped(text, start, border.end() - len(border.group(border.lastindex or 1))))
                start = border.end()
        spans.append(stripped(text, start, last))
    return [s for s in spans if s.start < s.end]


def asides(text: str) -> list[re.Match[str]]:
    """Code between fences, and, outside of it, front matter, comments and tables."""
    found: list[re.Match[str]] = []
    closed = text.rfind("-->") + 3  # behind it, each comment would be looked for to the end of the text
    for kind, end in ((FENCED, len(text)), (FRONT, len(text)), (COMMENT, closed), (TABLE, len(text))):
        found += [aside for aside in kind.finditer(text, 0, end) if not touches(aside, found)]
    return found


def lines(text: str, aside: re.Match[str]) -> list[Span]:
    """The lines of an aside that say something."""
    found = [Span(*line.span("line")) for line in LINE.finditer(text, aside.start("lines"), aside.end("lines"))]
    return [stripped(text, *line) for line in found if not RULED.fullmatch(text, *line)]


def touches(found: re.Match[str], areas: list[re.Match[str]]) -> bool:
    return any(area.start() < found.end() and found.start() < area.end() for area in areas)


def ends_sentence(border: re.Match[str], text: str) -> bool:
    """Whether a sentence ends here: behind a full stop if what follows can begin one, at every other border always."""
    if border["space"] is None or "\n\n" in border["space"]:
        return True
    following = text[border.end() : border.end() + 3].lstrip("'\"\u2018\u201c([")[:1]
    shortened = (ABBREVIATION, COUNTED) if following.isdigit() else (ABBREVIATION,)
    if any(words.search(text, max(0, border.start() - 8), border.start() + 1) for words in shortened):
        return False
    return following.isalnum() and not following.islower()


def stripped(text: str, start: int, end: int) -> Span:
    inside = text[start:end]
    return Span(start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip()))


def headings(text: str) -> list[re.Match[str]]:
    """Headings, in order: Markdown's, and those with a line below."""
    apart = asides(text)
    underlined = [h for h in UNDERLINED.finditer(text) if len(h["line"]) >= len(h["heading"])]
    found = [h for h in (*HEADING.finditer(text), *underlined) if not touches(h, apart)]
    return sorted(found, key=lambda h: h.start())


def occurrences(passage: str, text: str) -> list[Span]:
    """Every place of a passage that begins and ends with whole words, whatever the white space between them; if there is none,
    those inside of words: what is quoted may leave an ending out, and in some languages a particle is one."""
    words = re.compile(r"\s+".join(map(re.escape, passage.split())))
    whole, torn, at = [], [], 0
    while match := words.search(text, at):
        inside = any(inside_word(text, border) for border in match.span())
        if not any(before_mark(text, border) for border in match.span()):
            (torn if inside else whole).append(Span(*match.span()))
        at = match.start() + 1 if inside else match.end()
    return whole or torn


def by_chance(passage: str, places: Sequence[Span]) -> bool:
    """Whether a passage is too short to be evidence: one or two words point to a sentence only where they stand once."""
    return len(terms(passage)) < FEWEST and len(places) > 1


def parts(text: str) -> list[Part]:
    """The parts under headings; none for a text without."""
    found = headings(text)
    ends = [*(h.start() for h in found), len(text)][1:]
    return [Part(h.group(1), h.end(), end) for h, end in zip(found, ends, strict=True)]
