"""Which dialogues are trained on: each once, none that the evaluation asks, none whose document is held out; and what they measure.

Contamination is shared runs of words, as in GPT-3's appendix C (Brown et al. 2020, n = 13): a record is refused when it holds
a large share of the runs of an evaluation case's document, or of its question with its answer.
"""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from longlora.data.instructions import Bad, Dialogue, given, read_records
from longlora.data.wording import LEAD
from longlora.data.words import terms
from longlora.section import Section

PASSAGE = 50
"""Runs of words that a record and a held-out document share only where one is taken from the other."""

SHORTEST = 8
"""Words of a user's turn that is looked for alone; GPT-3's check takes no shorter runs."""


class Contamination(Section):
    cases: str | None
    """Evaluation cases, as a file or folder of records; null checks nothing, which longqa.cases do not allow."""
    words: int = Field(gt=0)
    """Length of a run of words; 13 in GPT-3's check. What is shorter counts as one run."""
    share: float = Field(gt=0, le=1)
    """Of the runs of a case that a record may not reach."""


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation, so that spacing, quotes, _emphasis_ and other forms of a sign hide nothing."""
    return terms(unicodedata.normalize("NFKC", text).casefold().replace("_", " "))


def unique(dialogues: Iterable[Dialogue]) -> tuple[list[Dialogue], list[Bad]]:
    """The first of each that says the same words in the same turns, and which were left out for which."""
    first: dict[bytes, str] = {}
    kept, left = [], []
    for dialogue in dialogues:
        words = [(t.role, words_of(t.content) or [t.content]) for t in dialogue.turns]
        key = hashlib.sha256(json.dumps(words).encode()).digest()
        if key in first:
            left.append(Bad(dialogue.place, "duplicate", f"says the same as {first[key]}"))
        else:
            first[key] = dialogue.place
            kept.append(dialogue)
    return kept, left


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))} if words else set()


def uncontaminated(dialogues: Iterable[Dialogue], settings: Contamination) -> tuple[list[Dialogue], list[Bad]]:
    """Those that hold no evaluation case, and which were left out for which case.

    Raises:
        ValueError: the cases cannot be read, or hold a bad record: a check against half of them is none.
    """
    if settings.cases is None:
        return list(dialogues), []
    cases = read_records(Path(settings.cases))
    if cases.bad:
        raise ValueError(f"contamination.cases {settings.cases}: {cases.summary()}")
    sizes: list[int] = []
    names: list[str] = []
    holders: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    for case in cases.dialogues:
        for text in texts_of(case, least=min(SHORTEST, settings.words)):
            found = runs(text, settings.words)
            for run in found:
                holders[run].add(len(sizes))
            sizes.append(len(found))
            names.append(case.place)
    shorter = {len(run) for run in holders}
    kept, left = [], []
    for dialogue in dialogues:
        whole = "\n".join(t.content for t in dialogue.turns)
        common = Counter(i for n in shorter for run in runs(whole, n) & holders.keys() for i in holders[run])
        worst = max(common, key=lambda i: common[i] / sizes[i], default=None)
        if worst is not None and common[worst] / sizes[worst] >= settings.share:
            share = common[worst] / sizes[worst]
            left.append(Bad(dialogue.place, "contamination", f"holds {share:.0%} of evaluation case {names[worst]}"))
        else:
            kept.append(dialogue)
    return kept, left


def about_held_out(
    dialogues: Iterable[Dialogue], texts: Iterable[str], settings: Contamination
) -> tuple[list[Dialogue], list[Bad]]:
    """Those that hold nothing of held-out `texts`, and which were left out: `PASSAGE` of their runs of words stand there, or the
    share of them in `settings`, or that share of one text's."""
    owner: dict[int, int] = {}
    sizes: list[int] = []
    for number, text in enumerate(texts):
        found = runs(text, settings.words)
        sizes.append(len(found))
        for run in found:
            owner.setdefault(hash(run), number)
    kept, left = [], []
    for dialogue in dialogues:
        own = runs("\n".join(t.content for t in dialogue.turns), settings.words)
        owners = Counter(owner[hash(run)] for run in own if hash(run) in owner)
        shared = owners.total()
        most = any(times >= settings.share * sizes[number] for number, times in owners.items())
        if most or (shared and shared >= min(PASSAGE, settings.share * len(own))):
            left.append(Bad(dialogue.place, "contamination", f"{shared / len(own):.0%} of it is held out by blocks"))
        else:
            kept.append(dialogue)
    return kept, left


def beside(
    dialogues: Sequence[Dialogue], held_out: Iterable[Dialogue], settings: Contamination
) -> tuple[list[Dialogue], list[Bad]]:
    """Those that hold no `PASSAGE` of what is `given` in a `held_out` dialogue, and which were left out: their document is held
    out as well, under another name. What more than half of all hold is a form of asking, and no document."""
    owner: dict[int, str] = {}
    for dialogue in held_out:
        for run in {run for text in given(dialogue.turns) for run in runs(text, settings.words)}:
            owner.setdefault(hash(run), dialogue.place)
    texts = ("\n".join(t.content for t in d.turns) for d in dialogues if owner)
    shared = [owner.keys() & {hash(run) for run in runs(text, settings.words)} for text in texts]
    times = Counter(run for runs_of_one in shared for run in runs_of_one)
    kept, left = [], []
    for dialogue, common in zip(dialogues, shared or [set()] * len(dialogues), strict=True):
        passage = [owner[run] for run in common if 2 * times[run] <= len(dialogues)]
        if len(passage) >= PASSAGE:
            left.append(Bad(dialogue.place, "split", f"holds a passage of {min(passage)}, which is held out"))
        else:
            kept.append(dialogue)
    return kept, left


def texts_of(case: Dialogue, *, least: int) -> list[str]:
    """A case's document, and what is asked with each right answer, each judged alone: a long text would hide a short question.

    What is asked is the user's last line, as far as it is not the whole of his words, without our own word before a question. Turns
    of fewer than `least` words ("Go on.") are no case by themselves: most texts would hold them.
    """
    said = given(case.turns)
    lines = [line for line in said[-1].splitlines() if line.strip()]
    asked = lines[-1] if len(lines) > 1 else said[-1]
    answered = [f"{asked}\n{answer}" for answer in (case.turns[-1].content, *case.others)]
    bare = [text.removeprefix(LEAD.strip()) for text in answered]
    answered = [short if len(words_of(short)) >= least else text for short, text in zip(bare, answered, strict=True)]
    alone = said if len(lines) > 1 else said[:-1]
    return [*(text for text in alone if len(words_of(text)) >= least), *answered]


class Split(NamedTuple):
    train: list[Dialogue]
    held_out: list[Dialogue]
    left: list[Bad]


def apart(dialogues: Sequence[Dialogue], *, share: float, seed: int) -> Split:
    """Those to train on, and those about a seeded `share` of the documents, held out. What is about documents of both sides is
    left out.

    Raises:
        ValueError: the share leaves nothing to train on, or nothing held out.
    """
    names = sorted({name for d in dialogues for name in d.documents})
    count = round(share * len(names))
    if names and count == len(names):
        raise ValueError(f"pairs.held_out = {share} of {len(names)} documents leaves none to train on")
    if names and share and not count:
        raise ValueError(
            f"pairs.held_out = {share} of {len(names)} documents is less than half of one: none is held out"
        )
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    split = Split([], [], [])
    for dialogue in dialogues:
        inside = chosen.intersection(dialogue.documents)
        if not inside:
            split.train.append(dialogue)
        elif inside == set(dialogue.documents):
            split.held_out.append(dialogue)
        else:
            split.left.append(
                Bad(dialogue.place, "split", f"is about {sorted(inside)[0]}, which is held out, and others")
            )
    return split


def statistics(lengths: Sequence[int]) -> dict[str, Any]:
    """Count, total, least, median, 95th percentile and most; and a histogram by powers of two ('512': 512 to 1,023)."""
    if not lengths:
        return {"count": 0}
    bins = Counter(1 << (n.bit_length() - 1) if n else 0 for n in lengths)
    return {
        "count": len(lengths),
        "total": sum(lengths),
        "least": min(lengths),
        "median": int(np.percentile(lengths, 50, method="lower")),
        "p95": int(np.percentile(lengths, 95, method="lower")),
        "most": max(lengths),
        "histogram": {str(n): bins[n] for n in sorted(bins)},
    }
