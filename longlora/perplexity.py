"""Perplexity by context length, in two protocols, both with full attention, each token counted once, no window across documents.

*Controlled*: the same last tokens of the same places of the held-out documents, while only the window before them grows.
Lengths and models share their targets, so differences are the context's or the model's, and models compare in pairs, place
by place. *Sliding*: LongLoRA's PG19 protocol (section 4.1, after Press et al. 2021): a window of each length moves over the
documents by a stride, and only tokens that no window has scored yet count; targets differ from length to length.
Windows start inside documents without a begin mark. A model may be asked for more positions than it declares: that is how an
unextended base shows that it breaks.

Letters: B windows of a batch, L tokens of a window, N scored tokens of a window, V vocabulary, P places.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from longlora.interval import bootstrap
from longlora.plain import batch_tokens
from longlora.section import Section

SCORED = 2048
"""Tokens scored by one window, at most: the first window of a long length would need gigabytes of logits."""
BATCH_LOGITS = 2**26
"""Logits that are in memory at once, at most (one window may need more): 256 MB."""


class Sliding(Section):
    stride: int = Field(gt=0)
    """Tokens by which the window moves; 256 in the LongLoRA paper."""
    tokens: int = Field(gt=0)
    """Scored tokens per length, at most: the first ones of the held-out documents."""


class Perplexity(Section):
    lengths: list[int] = Field(min_length=1)
    """Windows in tokens, scored tokens included."""
    last: int = Field(gt=0)
    """Tokens scored at the end of each window."""
    samples: int = Field(gt=0)
    """Places, drawn from all that have the longest window before them inside one document; their tokens never overlap."""
    seed: int
    sliding: Sliding | None
    """The second protocol; null leaves it out."""

    @model_validator(mode="after")
    def windows_hold_more_than_what_is_scored(self) -> Self:
        if min(self.lengths) <= self.last:
            raise ValueError(
                f"the shortest of lengths, {min(self.lengths)}, must be longer than last = {self.last}, at least {self.last + 1}"
            )
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"a length stands twice in {self.lengths}")
        if self.sliding and self.sliding.stride >= min(self.lengths):
            raise ValueError(
                f"sliding.stride = {self.sliding.stride} must be below the shortest length, {min(self.lengths)}"
            )
        return self


@dataclass(frozen=True)
class Place:
    """The tokens [end - last, end) of a document."""

    document: int
    end: int


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a document, of which the last `scored` count."""

    document: int
    start: int
    end: int
    scored: int


def places(lengths_of_documents: list[int], *, longest: int, last: int, samples: int, seed: int) -> list[Place]:
    """Up to `samples` places, in the order of the text: a seeded choice among spans that never overlap.

    Raises:
        ValueError: no document is as long as the longest window.
    """
    grid = [
        Place(document, end)
        for document, length in enumerate(lengths_of_documents)
        for end in range(longest, length + 1, last)
    ]
    if not grid:
        raise ValueError(
            f"no held-out document has {longest} tokens, the longest window; the longest has "
            f"{max(lengths_of_documents, default=0)}: lower perplexity.lengths, or hold out longer documents"
        )
    chosen = np.random.default_rng(seed).permutation(len(grid))[:samples]
    return [grid[i] for i in sorted(chosen)]


@torch.inference_mode()
def nats(model: PreTrainedModel, *, documents: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """The summed negative log likelihood (nats) of the scored tokens of each window. Logits are made for those alone."""
    total_W = np.empty(len(windows), dtype=np.float64)
    for batch in batches(windows, tokens=batch_tokens(model), vocabulary=model.config.get_text_config().vocab_size):
        group = [windows[i] for i in batch]
        tokens_BL = torch.from_numpy(
            np.stack([documents[w.document][w.start : w.end].astype(np.int64) for w in group])
        ).to(model.device)
        scored = group[0].scored
        # The last token is only predicted, never read.
        logits_BNV = model(input_ids=tokens_BL[:, :-1], use_cache=False, logits_to_keep=scored).logits.float()
        loss_BN = F.cross_entropy(logits_BNV.transpose(1, 2), tokens_BL[:, -scored:], reduction="none")
        total_W[batch] = loss_BN.double().sum(dim=1).cpu().numpy()
    return total_W


def batches(windows: list[Window], *, tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Numbers of windows of one shape, in order, as many at a time as `tokens` and the logits allow, at least one."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(windows):
        shapes.setdefault((window.end - window.start, window.scored), []).append(number)
    for (length, scored), numbers in shapes.items():
        size = max(1, min(tokens // length, BATCH_LOGITS // (scored * vocabulary)))
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def controlled(
    model: PreTrainedModel, *, documents: list[np.ndarray], settings: Perplexity
) -> tuple[list[Place], dict[int, np.ndarray]]:
    """The places, and per length the nats (P,) of their last tokens.

    Raises:
        ValueError: as `places`.
    """
    chosen = places(
        [len(d) for d in documents],
        longest=max(settings.lengths),
        last=settings.last,
        samples=settings.samples,
        seed=settings.seed,
    )
    scores = {}
    for length in sorted(settings.lengths):
        windows = [Window(p.document, p.end - length, p.end, settings.last) for p in chosen]
        scores[length] = nats(model, documents=documents, windows=windows)
        print(
            f"{length} tokens: perplexity {perplexity(scores[length].sum(), len(chosen) * settings.last):.4g}",
            flush=True,
        )
    return chosen, scores


def sliding_windows(lengths_of_documents: list[int], *, length: int, sliding: Sliding) -> list[Window]:
    """Windows that together score every token but a document's first, once, until `sliding.tokens` are scored.

    A document's first window scores all of itself, in parts of at most SCORED tokens that all begin at the document's start.
    """
    windows: list[Window] = []
    left = sliding.tokens
    for document, size in enumerate(lengths_of_documents):
        scored_to = 1
        while scored_to < size and left > 0:
            wanted = length - scored_to if scored_to < length else sliding.stride
            count = min(wanted, size - scored_to, left, SCORED)
            end = scored_to + count
            windows.append(Window(document, max(0, end - length), end, count))
            left, scored_to = left - count, end
    return windows


def perplexity(total: float, tokens: int) -> float:
    """exp of the mean; infinite where that is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(total / tokens))


def score(sums_P: np.ndarray, *, counts_P: np.ndarray, seed: int) -> dict[str, Any]:
    """Perplexity with its 95 % interval over the parts; a value that is not finite is null (JSON has no NaN)."""
    low, high = bootstrap(sums_P, counts_N=counts_P, seed=seed)
    figures = {
        "value": perplexity(sums_P.sum(), int(counts_P.sum())),
        "low": perplexity(low, 1),
        "high": perplexity(high, 1),
    }
    return {
        **{name: round(figure, 6) if np.isfinite(figure) else None for name, figure in figures.items()},
        "tokens": int(counts_P.sum()),
    }


def measure(
    model: PreTrainedModel, *, label: str, documents: list[np.ndarray], settings: Perplexity, parts: Path
) -> dict[str, Any]:
    """All perplexities of the model `label`, by protocol, label and length; the nats of each place go to the CSV `parts`.

    Raises:
        ValueError: no document is as long as the longest window, or there are none.
    """
    chosen, sums = controlled(model, documents=documents, settings=settings)
    write_parts(parts, chosen=chosen, sums=sums, last=settings.last)
    counts_P = np.full(len(chosen), settings.last)
    result: dict[str, Any] = {
        "perplexity": {
            label: {
                "places": len(chosen),
                "documents": len({p.document for p in chosen}),
                "documents_too_short": sum(len(d) < max(settings.lengths) for d in documents),
                **{str(n): score(s_P, counts_P=counts_P, seed=settings.seed) for n, s_P in sums.items()},
            }
        }
    }
    if settings.sliding:
        result["sliding_perplexity"] = {
            label: slide(model, documents=documents, settings=settings, sliding=settings.sliding)
        }
    return result


def slide(
    model: PreTrainedModel, *, documents: list[np.ndarray], settings: Perplexity, sliding: Sliding
) -> dict[str, Any]:
    """The sliding protocol, by length; the interval is over windows."""
    result = {}
    for length in sorted(settings.lengths):
        windows = sliding_windows([len(d) for d in documents], length=length, sliding=sliding)
        sums = nats(model, documents=documents, windows=windows)
        result[str(length)] = score(sums, counts_P=np.array([w.scored for w in windows]), seed=settings.seed)
        print(f"{length} tokens, sliding: perplexity {result[str(length)]['value']}", flush=True)
    return result


def write_parts(file: Path, *, chosen: list[Place], sums: dict[int, np.ndarray], last: int) -> None:
    """One row per length and place, so that models can be compared place by place."""
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["length", "document", "end", "tokens", "nats"])
        for length, sums_P in sums.items():
            rows.writerows([length, p.document, p.end, last, f"{s:.6f}"] for p, s in zip(chosen, sums_P, strict=True))
