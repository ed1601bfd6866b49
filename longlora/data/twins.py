"""Held-out documents that are trained on as well, found word for word and refused."""

import numpy as np

RUN = 50
"""Tokens of a run that no two documents share by chance (Lee et al. 2022, "Deduplicating Training Data", take as many)."""
BASE = 0x9E3779B97F4A7C15
"""Of the hashes of runs: odd, so that it has an inverse; 2 ** 64 over the golden ratio."""
TWIN = 0.5
"""Of a held-out document's runs, the share that may not stand in training documents."""


def refuse_twins(trained: list[np.ndarray], held_out: dict[str, np.ndarray], *, marks: list[int | None]) -> None:
    """Raise ValueError where half of a held-out document stands in training documents, word for word; `marks` are no words."""
    apart = {name: runs(tokens, marks=marks) for name, tokens in held_out.items()}
    known = np.unique(np.concatenate(list(apart.values())))
    seen = np.zeros(len(known), dtype=bool)
    for tokens in trained:
        found = runs(tokens, marks=marks)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        seen[at[known[at] == found]] = True
    shares = {name: seen[np.searchsorted(known, own)].mean() for name, own in apart.items()}
    twins = [name for name, share in shares.items() if share >= TWIN]
    if twins:
        raise ValueError(
            f"{len(twins)} of {len(held_out)} held-out documents are also trained on, word for word, {twins[0]} first "
            f"({shares[twins[0]]:.0%} of it): leave them out of one side"
        )


def runs(tokens: np.ndarray, *, marks: list[int | None]) -> np.ndarray:
    """A hash (64 bits) of every run of `RUN` tokens, `marks` left out; of all of them where there are fewer."""
    bare = np.asarray(tokens)[~np.isin(tokens, [mark for mark in marks if mark is not None])].astype(np.uint64)
    length = min(RUN, len(bare))
    # A polynomial in an odd number, modulo 2 ** 64: sums of the terms so far, taken from each other, and divided by the power.
    sums = np.cumsum((bare + np.uint64(1)) * powers(BASE, len(bare)))
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    return (sums[length:] - sums[: len(sums) - length]) * powers(pow(BASE, -1, 2**64), len(sums) - length)


def powers(base: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, base, dtype=np.uint64))
