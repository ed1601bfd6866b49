"""Cases of long-document question answering from real texts: excerpts of controlled lengths, questions at controlled depths.

An excerpt is a run of whole sentences of one document, or of several documents under their names as headings. Of each excerpt
one question of every kind is asked (longlora/data/questions.py). The same documents, settings and seed give the same bytes.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from longlora.data.questions import LONGEST, SHORTEST, Asked, Excerpt, Kind, ask, askable, flat
from longlora.data.reading import Document
from longlora.data.sentences import prose
from longlora.data.tokenise import places
from longlora.data.words import UNSPACED, pieces
from longlora.section import Section, Seed

Measure = Callable[[str], np.ndarray]
"""Where each unit of length (a word, a token) of a text ends, in characters, ascending."""
TRIES = 24
"""Excerpts that are tried for a question of one kind."""
FULL = 0.8
"""Of the asked length, what an excerpt of several documents holds at least."""


class Casebook(Section):
    lengths: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    """Of the excerpts, at most; in words, or in tokens where there is a tokenizer."""
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    """Where the first evidence stands: the share of the excerpt before it, 0 to 1."""
    kinds: list[Kind] = Field(min_length=1)
    """Of the questions; longlora/data/questions.py describes each."""
    samples: int = Field(gt=0)
    """Questions of each kind, at each length and depth."""
    collections: float = Field(ge=0, le=1)
    """Share of the excerpts that are put together from several documents."""
    seed: Seed


@dataclass(frozen=True)
class DocumentCase:
    """A question on a document, and what answers it."""

    document: str
    question: str
    answers: list[str]
    evidence: list[str]
    kind: Kind | Literal["written"]
    """written: by a model, see longlora/data/author.py."""
    depth: float | None
    """Where the first evidence begins, as a share of the document's characters; None where the document does not say."""
    length: int
    """Of the document, in units of the measure."""
    sources: list[str]


class TooShortError(ValueError):
    """The documents have no excerpt of a length."""

    def __init__(self, said: str, length: int) -> None:
        super().__init__(said)
        self.length = length


@dataclass(frozen=True)
class Built:
    cases: list[DocumentCase]
    """Each question once on the same text."""
    missing: list[str]
    """Questions that no excerpt allowed, in words."""
    unfit: list[str]
    """Documents without a sentence to ask about, by name; no excerpt is of them."""
    repeated: int = 0
    """Questions that came again on the same text."""


def words(text: str) -> np.ndarray:
    """Ends of the words: what stands between white space, or, in scripts without spaces, each character."""
    found = re.finditer(r"\S+", text)
    if not UNSPACED.search(text):
        return np.array([m.end() for m in found], dtype=np.int64)
    ends = (accumulate(map(len, pieces(m.group())), initial=m.start()) for m in found)
    return np.array([end for starts_first in ends for end in islice(starts_first, 1, None)], dtype=np.int64)


def tokens(tokenizer: PreTrainedTokenizerBase) -> Measure:
    """Ends of the tokens of a fast tokenizer."""

    def ends(text: str) -> np.ndarray:
        return np.array([end for _, end in places(tokenizer, text)], dtype=np.int64)

    return ends


class Source:
    """A document with its units and sentences, to cut excerpts from."""

    def __init__(self, document: Document, measure: Measure) -> None:
        self.name, self.text = document.name, document.text
        self.ends = measure(self.text)
        self.spans = prose(self.text)  # never cut inside of code, whose other fence would then open code
        starts = np.array([s.start for s in self.spans], dtype=np.int64)
        self.units = np.searchsorted(self.ends, starts, side="right")
        self.fit = [flat(self.text[s.start : s.end]) for s in self.spans if askable(self.text, s)]

    def cut(self, length: int, dice: random.Random) -> str:
        """Whole sentences from a random place, at most `length` units; '' if that is less than a sentence."""
        latest = int(np.searchsorted(self.units, max(0, len(self.ends) - length), side="right"))
        first = dice.randrange(max(1, latest))
        last_unit = min(self.units[first] + length, len(self.ends)) - 1
        start, limit = self.spans[first].start, int(self.ends[last_unit])
        inside = [s.end for s in self.spans[first:] if s.end <= limit] if last_unit >= 0 else []
        return self.text[start : max(inside, default=start)]


def build(documents: Sequence[Document], settings: Casebook, *, measure: Measure) -> Built:
    """All cases, by length, depth, sample and kind.

    Raises:
        ValueError: not one question can be asked.
        TooShortError: the documents have too little text for a length.
    """
    every = [Source(d, measure) for d in documents]
    sources = [s for s in every if s.fit]
    if not sources:
        hold = "document holds" if len(documents) == 1 else "documents hold"
        raise ValueError(f"{len(documents)} {hold} no sentence of {SHORTEST} to {LONGEST} characters to ask about")
    found: list[DocumentCase] = []
    missing: list[str] = []
    for length in settings.lengths:
        for depth in settings.depths:
            for sample in range(settings.samples):
                name = f"{settings.seed} {length} {depth} {sample}"
                for kind, case in cell(sources, name, length=length, depth=depth, settings=settings, measure=measure):
                    if case is None:
                        missing.append(f"{kind} at length {length}, depth {depth}, sample {sample + 1}")
                    else:
                        found.append(case)
    if not found:
        raise ValueError(f"no question can be asked: {len(missing)} were tried, the first {missing[0]}")
    cases = list({(case.document, case.question): case for case in found}.values())
    return Built(cases, missing, [s.name for s in every if not s.fit], len(found) - len(cases))


def cell(
    sources: Sequence[Source], name: str, *, length: int, depth: float, settings: Casebook, measure: Measure
) -> Iterator[tuple[Kind, DocumentCase | None]]:
    """A question of each kind about one excerpt; a kind that it does not allow is asked about another."""
    waiting = list(settings.kinds)
    answered: dict[Kind, DocumentCase] = {}
    for attempt in range(TRIES):
        dice = random.Random(f"{name} {attempt}")
        text, used = excerpt(sources, length=length, collections=settings.collections, measure=measure, dice=dice)
        if not text:
            continue
        whole = Excerpt(text, foreign=dice.choice(sources).fit)
        size = len(measure(text))
        for kind in list(waiting):
            if asked := ask(kind, whole, depth=depth, dice=random.Random(f"{name} {attempt} {kind}")):
                answered[kind] = case(whole, asked, kind=kind, length=size, sources=used)
                waiting.remove(kind)
        if not waiting:
            break
    return ((kind, answered.get(kind)) for kind in settings.kinds)


def case(whole: Excerpt, asked: Asked, *, kind: Kind, length: int, sources: list[str]) -> DocumentCase:
    depth = None if asked.start is None else round(asked.start / len(whole.text), 4)
    return DocumentCase(whole.text, asked.question, asked.answers, asked.evidence, kind, depth, length, sources)


def excerpt(
    sources: Sequence[Source], *, length: int, collections: float, measure: Measure, dice: random.Random
) -> tuple[str, list[str]]:
    """A text of at most `length` units, '' if that is less than a sentence, and the names of its documents.

    Raises:
        TooShortError: the documents together are shorter than that.
    """
    long_enough = [s for s in sources if len(s.ends) >= length]
    if long_enough and (len(sources) == 1 or dice.random() >= collections):
        return single(long_enough, length=length, dice=dice)
    share = length // dice.choice((2, 3, 4, 5))
    drawn = dice.sample(sources, len(sources))
    text, names, held = joined(drawn, length=length, share=share, measure=measure, dice=dice)
    if held < FULL * length and long_enough:  # so short that the parts of a collection would be less than sentences
        return single(long_enough, length=length, dice=dice)
    if held < FULL * length:  # few or short documents: their parts are not enough, perhaps all of them are
        text, names, held = joined(drawn, length=length, share=length, measure=measure, dice=dice)
    if held < FULL * length:
        total = sum(len(s.ends) for s in sources)
        have = f"document of {total} units has" if len(sources) == 1 else f"documents of {total} units together have"
        said = f"{len(sources)} {have} no excerpt of {length}: lower the lengths"
        raise TooShortError(said, length)
    return text, names


def joined(
    sources: Sequence[Source], *, length: int, share: int, measure: Measure, dice: random.Random
) -> tuple[str, list[str], int]:
    """Parts of at most `share` units of the `sources`, in their order, under their names, as long as there is room for them; the
    names, and the units of all."""
    text, names, left = "", [], length
    for source in sources:
        title = f"# {source.name}\n\n"
        room = min(left, share) - len(measure(title))
        piece = source.cut(room, dice) if room > 0 else ""
        if piece:
            text += title + piece + "\n\n"
            names.append(source.name)
            left = length - len(measure(text))
        if left < length // 20:
            break
    return text.rstrip("\n"), names, length - left


def single(sources: Sequence[Source], *, length: int, dice: random.Random) -> tuple[str, list[str]]:
    source = dice.choice(sources)
    return source.cut(length, dice), [source.name]


def write(cases: Sequence[DocumentCase], file: Path) -> None:
    """One case a line, keys in the order of `DocumentCase`; an older file is there until the new one is whole."""
    file = file.resolve()  # a link stays one
    file.parent.mkdir(parents=True, exist_ok=True)
    device = file.exists() and not file.is_file()  # such as /dev/stdout
    partial = file if device else file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(json.dumps(asdict(c), ensure_ascii=False) + "\n" for c in cases)
        if not device:
            partial.rename(file)
    finally:
        if not device:
            partial.unlink(missing_ok=True)
