"""Scores of questions over all of them, by the length of the document, and by the depth of the evidence in it.

A bucket is named by its upper end, which belongs to it. Lengths are powers of two, and the most that a prompt may have:
documents of 257 to 512 tokens are at 512. Depths are quarters: evidence that begins behind more than a quarter of the document,
and half of it at most, is at 0.50. How many questions a bucket has is the number of its trials; a bucket without any is not there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora.evaluation.interval import figure, share

PARTED = ("exact", "f1", "evidence", "evidence_floor")
"""Scores that are also given by length and depth."""
QUARTERS = 4


@dataclass(frozen=True)
class Marked:
    """An answered question."""

    scores: dict[str, float]
    """By name, 0 to 1; without `evidence` and its floor where the case has no evidence."""
    source: str
    """Questions on one source are not independent."""
    tokens: int
    """Of the whole document."""
    depth: float | None
    """The share of the document before the evidence, 0 to 1; None without evidence."""


def overall(marked: Sequence[Marked]) -> dict[str, Any]:
    """Each score over the questions that have it, with its 95 % interval."""
    names = list(dict.fromkeys(name for one in marked for name in one.scores))
    return {name: score(name, marked) for name in names}


def by_length(marked: Sequence[Marked], *, name: str, longest: int) -> dict[str, Any]:
    """The score `name` by length, and within it by depth; empty where no question has it. `longest` is the most tokens that
    a prompt may have."""
    having = [one for one in marked if name in one.scores]
    return {
        str(end): score(name, inside)
        | {"depth": {depth: score(name, some) for depth, some in at_depths(inside).items()}}
        for end, inside in buckets(having, lambda one: upper_length(one.tokens, longest=longest)).items()
    }


def by_depth(marked: Sequence[Marked]) -> dict[str, Any]:
    """The scores by depth, over the questions that have evidence, of all lengths."""
    return {depth: {name: score(name, inside) for name in PARTED} for depth, inside in at_depths(marked).items()}


def score(name: str, marked: Sequence[Marked]) -> dict[str, Any]:
    having = [one for one in marked if name in one.scores]
    shares = np.array([one.scores[name] for one in having])
    ends = share(shares, groups_N=[one.source for one in having])
    return figure(shares.mean(), ends, trials=len(shares))


def at_depths(marked: Sequence[Marked]) -> dict[str, list[Marked]]:
    """The questions with evidence, by the bucket of its depth."""
    found = buckets([one for one in marked if one.depth is not None], lambda one: upper_depth(one.depth or 0.0))
    return {f"{end:.2f}": inside for end, inside in found.items()}


def buckets(marked: Sequence[Marked], key: Callable[[Marked], float]) -> dict[float, list[Marked]]:
    """In order of their ends."""
    return {end: [one for one in marked if key(one) == end] for end in sorted(set(map(key, marked)))}


def upper_length(tokens: int, *, longest: int) -> int:
    """The least of the powers of two and `longest` that is not below `tokens`."""
    power = 1 << (tokens - 1).bit_length() if tokens > 1 else 1
    return longest if tokens <= longest < power else power


def upper_depth(depth: float) -> float:
    return max(1, math.ceil(QUARTERS * depth)) / QUARTERS
