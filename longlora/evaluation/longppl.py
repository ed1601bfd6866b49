"""LongPPL (Fang et al. 2024, "What is wrong with perplexity for long-context language modeling?"): perplexity of key tokens alone.

Most tokens need no long context, so their mean hides what it is for. Key tokens are those that an evaluator finds much
likelier with the long context than with a short one: log P(long) - log P(short) > alpha (the long-short difference), and
log P(long) > beta (so that it is no accident). LongPPL of a model is exp of its mean nats over them, with the long context.

Who picks the tokens favours itself: a model's lucky guesses are among its own. So one evaluator, named in params.yaml, picks
for all models, and it should not be the one that is to be judged.

Letters: P long windows, L tokens of a long window, N tokens scored by one short window.
"""

from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from longlora.evaluation.interval import figure, grouped
from longlora.evaluation.windows import Target, Window, last_nats, targets, token_nats
from longlora.parallel.sharding import say
from longlora.section import Section, Seed


class LongPPL(Section):
    length: int = Field(gt=0)
    """The long context, in tokens."""
    short: int = Field(gt=0)
    """The short context, in tokens, at least; 4,096 in the paper."""
    stride: int = Field(gt=0)
    """Tokens that one short window scores: their context is short to short + stride - 1 tokens; 1,024 in the paper."""
    samples: int = Field(gt=0)
    """Long windows, drawn from the held-out documents."""
    alpha: float
    """Nats by which the long context must help; 2 in the paper."""
    beta: float
    """Log likelihood that is at least reached with it; -2 in the paper."""
    seed: Seed

    @model_validator(mode="after")
    def contexts_fit(self) -> Self:
        if not self.stride < self.short < self.length:
            raise ValueError(
                f"stride < short < length is asked, not {self.stride}, {self.short}, {self.length}: a short window must "
                "leave some context, and a long one more of it"
            )
        return self


def windows_of(documents: list[np.ndarray], settings: LongPPL) -> list[Target]:
    """The long windows, each a target as a whole.

    Raises:
        ValueError: no document is as long as a long window.
    """
    return targets(
        [len(d) for d in documents],
        longest=settings.length,
        last=settings.length,
        samples=settings.samples,
        seed=settings.seed,
        setting="longppl.length",
    )


def long_nats(model: PreTrainedModel, *, documents: list[np.ndarray], chosen: list[Target], length: int) -> np.ndarray:
    """Nats (P, L), float64, of every token of the long windows with all before it; the first, never predicted, is infinite."""
    windows = [Window(p.document, p.end - length, p.end, length - 1) for p in chosen]
    nats_PL = token_nats(model, documents=documents, windows=windows).astype(np.float64)
    return np.pad(nats_PL, ((0, 0), (1, 0)), constant_values=np.inf)


def short_nats(
    model: PreTrainedModel, *, documents: list[np.ndarray], chosen: list[Target], settings: LongPPL
) -> np.ndarray:
    """Nats (P, L) of the tokens of the long windows with the short context alone; what has no more before it is NaN."""
    nats_PL = np.full((len(chosen), settings.length), np.nan)
    # of what one window scores, by how many tokens that are: at the end there may be fewer
    starts: dict[int, list[int]] = {}
    for start in range(settings.short, settings.length, settings.stride):
        starts.setdefault(min(settings.stride, settings.length - start), []).append(start)
    for row, target in enumerate(chosen):
        first = target.end - settings.length
        for count, some in starts.items():
            windows = [Window(target.document, first + s - settings.short, first + s + count, count) for s in some]
            scored = last_nats(model, documents=documents, windows=windows)
            nats_PL[row, some[0] : some[0] + scored.size] = scored.reshape(-1)
    return nats_PL


def key_tokens(model: PreTrainedModel, *, documents: list[np.ndarray], settings: LongPPL) -> dict[str, Any]:
    """The places, and per place the positions in its long window of the tokens that the evaluator picks.

    Raises:
        ValueError: no document is as long as a long window.
    """
    chosen = windows_of(documents, settings)
    with_long_PL = -long_nats(model, documents=documents, chosen=chosen, length=settings.length)
    with_short_PL = -short_nats(model, documents=documents, chosen=chosen, settings=settings)
    with np.errstate(invalid="ignore"):
        is_key_PL = (with_long_PL - with_short_PL > settings.alpha) & (with_long_PL > settings.beta)
    looked_at = int(np.isfinite(with_short_PL).sum())
    say(f"{int(is_key_PL.sum())} of {looked_at} tokens are key tokens")
    picked = [
        {"document": p.document, "end": p.end, "keys": np.flatnonzero(row).tolist()}
        for p, row in zip(chosen, is_key_PL, strict=True)
    ]
    return {"length": settings.length, "looked_at": looked_at, "places": picked}


def measure(
    model: PreTrainedModel, *, label: str, evaluator: str, documents: list[np.ndarray], keys: dict[str, Any]
) -> dict[str, Any]:
    """LongPPL of the model `label` over the tokens that `evaluator` picked, with its 95 % interval, by the spread between
    documents; null where no token was picked, or it is not a number."""
    chosen = [Target(p["document"], p["end"]) for p in keys["places"]]
    nats_PL = long_nats(model, documents=documents, chosen=chosen, length=keys["length"])
    picked = [
        (row[p["keys"]].sum(), len(p["keys"]), p["document"])
        for row, p in zip(nats_PL, keys["places"], strict=True)
        if p["keys"]
    ]
    value, ends = np.nan, (np.nan, np.nan)
    if picked:
        sums_P, counts_P, documents_P = (np.array(column, dtype=np.float64) for column in zip(*picked, strict=True))
        low, high = grouped(sums_P, counts_N=counts_P, groups_N=documents_P.tolist())
        with np.errstate(over="ignore"):
            value, ends = np.exp(sums_P.sum() / counts_P.sum()), (np.exp(low), np.exp(high))
    found = figure(value, ends, tokens=sum(n for _, n, _ in picked), length=keys["length"])
    say(f"LongPPL {found['value']} over {found['tokens']} tokens")
    return {"longppl": {label: {evaluator: found}}}
