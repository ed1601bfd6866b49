"""Held-out documents that are trained on as well, or held out twice, found word for word and refused."""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np

RUN = 50
"""Tokens of a run that no two documents share by chance (Lee et al. 2022, "Deduplicating Training Data", take as many)."""
LETTERS = 100
"""Of a run of letters: some twenty words."""
BASE = 0x9E3779B97F4A7C15
"""Of the hashes of runs: odd, so that it has an inverse; 2 ** 64 over the golden ratio."""
TWIN = 0.5
"""Of a held-out document's runs, the share that may not stand in training documents, or in another held-out one."""

PART = 0.05
"""The share that is worth a word: a passage, where it is not a form of words."""


def refuse_copies(trained: Iterable[str], held_out: dict[str, str]) -> dict[str, float]:
    """`refuse_twins` by letters and digits alone: other line breaks, hyphens, quotes or capitals make no other text."""
    kept = {name: own for name, text in held_out.items() if len(own := letters(text))}
    if not kept:
        return {}
    return refuse_twins((own for text in trained if len(own := letters(text))), kept, marks=[], run=LETTERS)


def letters(text: str) -> np.ndarray:
    """Code points of the letters and digits, small ones, in NFKC."""
    bare = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())
    return np.frombuffer(bare.encode("utf-32-le"), dtype="<u4")


def refuse_twins(
    trained: Iterable[np.ndarray], held_out: dict[str, np.ndarray], *, marks: list[int | None], run: int = RUN
) -> dict[str, float]:
    """How much of held-out documents stands in training documents, word for word, by runs of so many tokens, where that is a `PART`
    of one at least, the most first; `marks` are no words.

    Raises:
        ValueError: it is half of one, or half of one stands in another held-out document.
    """
    apart = {name: runs(tokens, marks=marks, run=run) for name, tokens in held_out.items()}
    known, holders = np.unique(np.concatenate([np.unique(own) for own in apart.values()]), return_counts=True)
    seen = np.zeros(len(known), dtype=bool)
    for tokens in trained:
        found = runs(tokens, marks=marks, run=run)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        seen[at[known[at] == found]] = True
    if twins := mostly(seen, known=known, of=apart):
        raise ValueError(
            f"{len(twins)} of {len(held_out)} held-out documents {are(twins)} also trained on, word for word, {first(twins)}: "
            "leave them out of one side"
        )
    # A single run is all of a document that is too short for any window.
    longer = {name: own for name, own in apart.items() if len(own) > 1}
    if twins := mostly(holders > 1, known=known, of=longer):
        raise ValueError(
            f"{len(twins)} of {len(held_out)} held-out documents {are(twins)} in others of them, word for word, {first(twins)}: a "
            "text would count as several, so leave out all but one of each"
        )
    parts = mostly(seen, known=known, of=apart, least=PART)
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def mostly(
    chosen: np.ndarray, *, known: np.ndarray, of: dict[str, np.ndarray], least: float = TWIN
) -> dict[str, float]:
    """The documents of which at least the share `least` is `chosen` among the `known` runs, and how much of each."""
    shares = {name: float(chosen[np.searchsorted(known, own)].mean()) for name, own in of.items()}
    return {name: share for name, share in shares.items() if share >= least}


def are(twins: dict[str, float]) -> str:
    return "is" if len(twins) == 1 else "are"


def first(twins: dict[str, float]) -> str:
    name = next(iter(twins))
    return f"{name} first ({twins[name]:.0%} of it)"


def runs(tokens: np.ndarray, *, marks: list[int | None], run: int = RUN) -> np.ndarray:
    """A hash (64 bits) of every run of so many tokens, `marks` left out; of all of them where there are fewer."""
    bare = np.asarray(tokens)[~np.isin(tokens, [mark for mark in marks if mark is not None])].astype(np.uint64)
    length = min(run, len(bare))
    # A polynomial in an odd number, modulo 2 ** 64: sums of the terms so far, taken from each other, and divided by the power.
    sums = np.cumsum((bare + np.uint64(1)) * powers(BASE, len(bare)))
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    return (sums[length:] - sums[: len(sums) - length]) * powers(pow(BASE, -1, 2**64), len(sums) - length)


def powers(base: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, base, dtype=np.uint64))
