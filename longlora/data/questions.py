"""Questions on a long text that the text itself answers: written by rule, so that right answers are known and cost nothing.

Eight kinds. *following*: which sentence comes after this one; *heading*: under which heading it stands; *cloze*: the name left
out of a sentence; *number*: the number left out; *facts*: two such gaps far apart; *order*: how three sentences follow each
other; *count*: how often a word occurs; *absent*: a question whose sentence the text does not hold. Every answer but the last
kind's is shown by evidence that stands in the text word for word.

Long-context benchmarks ask the same (LongBench, RULER, NoLiMa's warning included: a question that repeats its passage can be
answered by matching words). So these teach and test finding, keeping apart, ordering and counting; they do not teach reasoning.
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from longlora.data.sentences import Part, Span, parts, prose, sentences
from longlora.data.wording import UNSAID
from longlora.data.words import UNSPACED, inside_word, terms, words

Kind = Literal["following", "heading", "cloze", "number", "facts", "order", "count", "absent"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GAP = "___"
SHORTEST, LONGEST = 40, 400
"""Characters of a sentence that is asked about."""
NAME = re.compile(r"(?<=[a-z,;] )(?:[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})*)\b")
NUMBER = re.compile(r"(?<![\d,.$^])(?:\d{1,3}(?:,\d{3})+|\d{2,})(?![\d,]|\.\d)")
WORD = re.compile(r"\b[^\W\d_]{5,}\b")
EMPHASISED = re.compile(r"(?<=_)[^\W\d_]+|[^\W\d_]+(?=_)")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEAR = 30
"""Characters beside a word that is counted, which its evidence shows."""
MOST = 9
"""Occurrences that are asked to be counted, at most."""


@dataclass(frozen=True)
class Asked:
    question: str
    answers: list[str]
    """The first is the answer; the others are as right."""
    evidence: list[str]
    """Passages that show it, word for word, in the text's order; none where the text does not say."""
    start: int | None
    """The first character of the first evidence."""


class Excerpt:
    """A text to ask about, with its sentences and headings; `foreign` are sentences of other texts, each on one line."""

    def __init__(self, text: str, *, foreign: Sequence[str]) -> None:
        self.text = text
        self.parts: list[Part] = parts(text)
        self.flat = flat(text)
        self.foreign = foreign
        self.spans = sentences(text)
        told = set(prose(text))  # rows and lines of code keep sentences around them apart, and are not asked about
        self.fit = [i for i, s in enumerate(self.spans) if s in told and askable(text, s)]

    def at(self, number: int) -> str:
        return self.text[slice(*self.spans[number])]

    def shown(self, number: int) -> str:
        """The sentence on one line, as questions and answers show it."""
        return flat(self.at(number))

    def near(self, depth: float) -> list[int]:
        """Sentences fit to be asked about, the nearest to `depth` (a share of the text) first."""
        goal = depth * len(self.text)
        return sorted(self.fit, key=lambda i: abs(self.spans[i].start - goal))

    def once(self, number: int) -> bool:
        """Whether the text holds this sentence once, wherever its lines break, so that a question about it has one answer."""
        return self.flat.count(self.shown(number)) == 1

    def fits(self, cut: tuple[str, str], pattern: re.Pattern[str]) -> int:
        """How many places of the text have the sentence of `cut` with whatever `pattern` finds in its gap."""
        before, after = map(re.escape, cut[0].split(GAP, 1))
        return sum(1 for _ in re.finditer(f"{before}(?:{pattern.pattern}){after}", self.flat))

    def says(self, sentence: str) -> bool:
        """Whether the text has the words of `sentence`, in whatever case and punctuation."""
        return f" {plain(sentence)} " in f" {self.plain} "

    @cached_property
    def plain(self) -> str:
        return plain(self.text)

    def heading(self, number: int) -> str | None:
        start = self.spans[number].start
        return next((p.heading for p in self.parts if p.start <= start < p.end), None)


def askable(text: str, sentence: Span) -> bool:
    """Whether a sentence may be asked about: neither short nor long, and without a web address, which is no wording of a text."""
    return SHORTEST <= sentence.end - sentence.start <= LONGEST and text.find("://", *sentence) < 0


def flat(text: str) -> str:
    """White space of every kind as single spaces: line breaks of a wrapped text are no part of a sentence."""
    return " ".join(text.split())


def plain(text: str) -> str:
    return " ".join(terms(text.casefold()))


def whole(found: re.Match[str]) -> bool:
    """Whether a match is no part of a word: for a regular expression words also end at an accent that is a sign of its own, and at
    a soft hyphen."""
    first, last = found.span()
    around = found.string[max(0, first - 1) : first] + found.string[last : last + 1]
    return not any(unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") for c in around)


def ask(kind: Kind, excerpt: Excerpt, *, depth: float, dice: random.Random) -> Asked | None:
    """A question of `kind` whose first evidence is as near to `depth` as the text allows; None if it allows none.

    Where the kind needs evidence all over the text (facts, order, count), or has none (absent), the depth is not followed.
    """
    asked = written(kind, excerpt, depth=depth, dice=dice)
    return asked if asked and all(map(words, asked.answers)) else None  # "# A" is a heading, and no word to be scored


def written(kind: Kind, excerpt: Excerpt, *, depth: float, dice: random.Random) -> Asked | None:
    match kind:
        case "following":
            return following(excerpt, depth)
        case "heading":
            return heading(excerpt, depth)
        case "cloze":
            return filled(excerpt, depth, dice, pattern=NAME)
        case "number":
            return filled(excerpt, depth, dice, pattern=NUMBER)
        case "facts":
            return facts(excerpt, dice)
        case "order":
            return order(excerpt, dice)
        case "count":
            return count(excerpt, dice)
        case "absent":
            return absent(excerpt, dice)


def following(excerpt: Excerpt, depth: float) -> Asked | None:
    fit = set(excerpt.fit)
    for i in excerpt.near(depth):
        if i + 1 in fit and excerpt.heading(i) == excerpt.heading(i + 1) and excerpt.once(i):
            first, second = excerpt.spans[i], excerpt.spans[i + 1]
            evidence = excerpt.text[first.start : second.end]
            return Asked(after(excerpt.shown(i)), [excerpt.shown(i + 1)], [evidence], first.start)
    return None


def after(sentence: str) -> str:
    return f"Which sentence comes directly after this one in the document?\n{sentence}"


def heading(excerpt: Excerpt, depth: float) -> Asked | None:
    names = Counter(p.heading for p in excerpt.parts)
    if len(names) < 2:
        return None
    for i in excerpt.near(depth):
        title = excerpt.heading(i)
        if title is not None and names[title] == 1 and excerpt.once(i):
            question = f"Under which heading of the document does this sentence stand?\n{excerpt.shown(i)}"
            return Asked(question, [title], [title, excerpt.at(i)], excerpt.spans[i].start)
    return None


def gap(sentence: str, pattern: re.Pattern[str], dice: random.Random) -> tuple[str, str] | None:
    """`sentence` with one match left out, and what was left out; None if there is none that stands in it once, or if the sentence
    has a blank of its own."""
    if GAP in sentence:
        return None
    once = (m for m in pattern.finditer(sentence) if len(re.findall(rf"\b{re.escape(m.group())}\b", sentence)) == 1)
    found = [m for m in once if whole(m)]
    if not found:
        return None
    chosen = dice.choice(found)
    return sentence[: chosen.start()] + GAP + sentence[chosen.end() :], chosen.group()


def filled(excerpt: Excerpt, depth: float, dice: random.Random, *, pattern: re.Pattern[str]) -> Asked | None:
    what = "number" if pattern is NUMBER else "name"
    for i in excerpt.near(depth):
        if excerpt.once(i) and (cut := gap(excerpt.shown(i), pattern, dice)) and excerpt.fits(cut, pattern) == 1:
            question = f"Which {what} of the document belongs where this sentence has {GAP}?\n{cut[0]}"
            return Asked(question, [cut[1]], [excerpt.at(i)], excerpt.spans[i].start)
    return None


def facts(excerpt: Excerpt, dice: random.Random) -> Asked | None:
    """Two gaps, one in each half of the text."""
    found = []
    for half in (0, 1):
        inside = [i for i in excerpt.fit if (2 * excerpt.spans[i].start >= len(excerpt.text)) == bool(half)]
        dice.shuffle(inside)
        for i in inside:
            if not excerpt.once(i):
                continue
            pattern = dice.choice((NAME, NUMBER))
            if (cut := gap(excerpt.shown(i), pattern, dice)) and excerpt.fits(cut, pattern) == 1:
                found.append((cut, i))
                break
    if len(found) < 2:
        return None
    lines = "\n".join(f"{n}. {cut[0]}" for n, (cut, _) in enumerate(found, start=1))
    one, two = (cut[1] for cut, _ in found)
    question = (
        f"What belongs where these sentences of the document have {GAP}? Give both, a semicolon between.\n{lines}"
    )
    evidence = [excerpt.at(i) for _, i in found]
    return Asked(question, [f"{one}; {two}", f"{one} and {two}"], evidence, excerpt.spans[found[0][1]].start)


def order(excerpt: Excerpt, dice: random.Random) -> Asked | None:
    """Three sentences, one of each third of the text, under letters drawn anew. The answer is one word: as several, an A would be
    an article, which no score counts, and F1 would take any order for the right one."""
    thirds: list[list[int]] = [[], [], []]
    for i in excerpt.fit:
        thirds[3 * excerpt.spans[i].start // len(excerpt.text)].append(i)
    chosen = []
    for third in thirds:
        dice.shuffle(third)
        chosen += [i for i in third[:20] if excerpt.once(i)][:1]
    if len(chosen) < 3:
        return None
    shown = dice.sample(chosen, 3)
    letters = {i: letter for i, letter in zip(shown, "ABC", strict=True)}
    lines = "\n".join(f"{letters[i]}. {excerpt.shown(i)}" for i in shown)
    question = (
        "In which order do these sentences stand in the document? Give their letters as one word, the first one first.\n"
        + lines
    )
    evidence = [excerpt.at(i) for i in chosen]
    return Asked(question, ["".join(letters[i] for i in chosen)], evidence, excerpt.spans[chosen[0]].start)


def count(excerpt: Excerpt, dice: random.Random) -> Asked | None:
    """Occurrences of a word, written exactly so; the evidence is each with its neighbours. How many is drawn first, and then the
    word: most words stand twice, and whoever always said so would be right of most."""
    times = Counter(m.group() for m in WORD.finditer(excerpt.text) if whole(m))
    for word in EMPHASISED.findall(excerpt.text):  # whoever counts them counts _these_, too
        times.pop(word, None)
    for word in [w for w, n in times.items() if 2 <= n <= MOST and UNSPACED.search(w)]:
        if excerpt.text.count(word) > times[word]:  # no space says where a word ends
            del times[word]
    few = sorted({n for n in times.values() if 2 <= n <= MOST})
    if not few:
        return None
    wanted = dice.choice(few)
    word = dice.choice([w for w, n in times.items() if n == wanted])
    places = [m.start() for m in re.finditer(rf"\b{word}\b", excerpt.text) if whole(m)]
    answer = times[word]
    evidence = [around(excerpt.text, p - NEAR, p + len(word) + NEAR) for p in places]
    question = f'How many times does the word "{word}" stand in the document, written exactly so?'
    return Asked(question, [str(answer), NUMERALS[answer]], evidence, places[0])


def around(text: str, start: int, end: int) -> str:
    """What stands there, the words whole in which it begins and ends."""
    start, end = max(0, start), min(len(text), end)
    while inside_word(text, start):
        start -= 1
    while inside_word(text, end):
        end += 1
    return text[start:end]


def absent(excerpt: Excerpt, dice: random.Random) -> Asked | None:
    """A sentence of another text, asked about as if it stood in this one."""
    for _ in range(20):
        if not excerpt.foreign:
            return None
        sentence = dice.choice(excerpt.foreign)
        if excerpt.says(sentence):
            continue
        cut = gap(sentence, NAME, dice) if dice.random() < 0.5 else None
        if cut and excerpt.fits(cut, NAME):
            continue
        question = (
            f"Which name of the document belongs where this sentence has {GAP}?\n{cut[0]}" if cut else after(sentence)
        )
        return Asked(question, [UNSAID], [], None)
    return None
