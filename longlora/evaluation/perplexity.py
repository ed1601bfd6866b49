"""Perplexity by context length, in two protocols, both with full attention, each token counted once, no window across documents.

*Controlled*: the same last tokens of the same places of the held-out documents, while only the window before them grows.
Lengths and models share their targets, so differences are the context's or the model's, and models compare in pairs, place
by place. *Sliding*: LongLoRA's PG19 protocol (section 4.1, after Press et al. 2021): a window of each length moves over the
documents by a stride, and only tokens that no window has scored yet count; targets differ from length to length.
Beside them, *by position*: nats per token within the longest windows of the controlled protocol, band by band, which shows
where in its context a model stops to profit from more of it.
Windows start inside documents without a begin mark. A model may be asked for more positions than it declares: that is how an
unextended base shows that it breaks.

Letters: L tokens of a window, P targets.
"""

import csv
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from longlora.evaluation.interval import figure, grouped
from longlora.evaluation.windows import Target, Window, nats, targets, token_nats
from longlora.model.load import must_reach
from longlora.parallel.sharding import rank, say
from longlora.section import Section, Seed

SCORED = 2048
"""Tokens whose logits are made at once, at most: all of a long window would need gigabytes."""


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
    per_document: int | None = Field(gt=0)
    """Places of one document, at most; null: any number. What makes a text easy is the same at all its places, so an interval is
    narrow only over many documents."""
    seed: Seed
    sliding: Sliding | None
    """The second protocol; null leaves it out."""
    bands: int | None = Field(gt=0)
    """Equal bands of positions, by which the nats inside the longest windows are told; null leaves them out."""

    @model_validator(mode="after")
    def windows_hold_more_than_what_is_scored(self) -> Self:
        if min(self.lengths) <= self.last:
            raise ValueError(
                f"the shortest of lengths, {min(self.lengths)}, must be longer than last = {self.last}, at least {self.last + 1}"
            )
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"a length stands twice in {self.lengths}")
        if self.bands and max(self.lengths) % self.bands:
            raise ValueError(f"bands = {self.bands} must divide the longest length, {max(self.lengths)}")
        if self.sliding and self.sliding.stride >= min(self.lengths):
            raise ValueError(
                f"sliding.stride = {self.sliding.stride} must be below the shortest length, {min(self.lengths)}"
            )
        return self


def chosen_targets(documents: list[np.ndarray], settings: Perplexity) -> list[Target]:
    """The targets of all lengths and all models.

    Raises:
        ValueError: as `targets`.
    """
    return targets(
        [len(d) for d in documents],
        longest=max(settings.lengths),
        last=settings.last,
        samples=settings.samples,
        per_document=settings.per_document,
        seed=settings.seed,
        setting="perplexity.lengths",
    )


def controlled(
    model: PreTrainedModel, *, documents: list[np.ndarray], chosen: list[Target], settings: Perplexity
) -> tuple[dict[int, np.ndarray], np.ndarray | None]:
    """Per length the nats (P,) of the chosen targets; and those (P, L - 1), float64, of every token but the first
    of the longest windows, which are read once for both, or None without bands."""
    longest, sums, nats_PL = max(settings.lengths), dict[int, np.ndarray](), None
    if settings.bands:
        windows = [Window(p.document, p.end - longest, p.end, longest - 1) for p in chosen]
        nats_PL = token_nats(model, documents=documents, windows=windows).astype(np.float64)
        sums[longest] = nats_PL[:, -settings.last :].sum(axis=1)
    for length in sorted(settings.lengths):
        if length not in sums:
            windows = [Window(p.document, p.end - length, p.end, settings.last) for p in chosen]
            sums[length] = nats(model, documents=documents, windows=windows)
        say(f"{length} tokens: perplexity {perplexity(sums[length].sum(), len(chosen) * settings.last):.4g}")
    return {length: sums[length] for length in sorted(sums)}, nats_PL


def by_position(nats_PL: np.ndarray, *, bands: int, documents_P: list[int]) -> dict[str, Any]:
    """Mean nats per band of positions, under the band's end, with intervals."""
    length = nats_PL.shape[1] + 1
    band, result = length // bands, {}
    for first in range(0, length, band):
        # The token at position 0 is read and never predicted, so column 0 is position 1.
        part_PL = nats_PL[:, max(0, first - 1) : first + band - 1]
        counts_P = np.full(len(part_PL), part_PL.shape[1])
        result[str(first + band)] = mean(part_PL.sum(axis=1), counts_P=counts_P, documents_P=documents_P)
    return result


def sliding_windows(lengths_of_documents: list[int], *, length: int, sliding: Sliding) -> list[Window]:
    """Windows that together score every token but a document's first, once, until `sliding.tokens` are scored. A document's first
    window scores all of itself."""
    windows: list[Window] = []
    left = sliding.tokens
    for document, size in enumerate(lengths_of_documents):
        scored_to = 1
        while scored_to < size and left > 0:
            wanted = length - scored_to if scored_to < length else sliding.stride
            count = min(wanted, size - scored_to, left)
            end = scored_to + count
            windows.append(Window(document, max(0, end - length), end, count))
            left, scored_to = left - count, end
    return windows


def perplexity(total: float, tokens: int) -> float:
    """exp of the mean; infinite where that is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(total / tokens))


def mean(sums_P: np.ndarray, *, counts_P: np.ndarray, documents_P: list[int]) -> dict[str, Any]:
    """Nats per token with its interval, by the spread between documents."""
    return figure(sums_P.sum() / counts_P.sum(), grouped(sums_P, counts_N=counts_P, groups_N=documents_P))


def score(sums_P: np.ndarray, *, counts_P: np.ndarray, documents_P: list[int]) -> dict[str, Any]:
    """Perplexity with its interval, by the spread between documents."""
    low, high = grouped(sums_P, counts_N=counts_P, groups_N=documents_P)
    tokens = int(counts_P.sum())
    return figure(perplexity(sums_P.sum(), tokens), (perplexity(low, 1), perplexity(high, 1)), tokens=tokens)


def measure(
    model: PreTrainedModel, *, label: str, documents: list[np.ndarray], settings: Perplexity, parts: Path
) -> dict[str, Any]:
    """All perplexities of the model `label`, by protocol, label and length; the nats of each place go to the CSV `parts`.

    Raises:
        ValueError: no document is as long as the longest window, or there are none, or the model cannot read one.
    """
    must_reach(model, max(settings.lengths) - 1)
    chosen = chosen_targets(documents, settings)
    sums, nats_PL = controlled(model, documents=documents, chosen=chosen, settings=settings)
    if rank() == 0:
        write_parts(parts, chosen=chosen, sums=sums, last=settings.last)
    counts_P, documents_P = np.full(len(chosen), settings.last), [p.document for p in chosen]
    result: dict[str, Any] = {
        "perplexity": {
            label: {
                "places": len(chosen),
                "documents": len(set(documents_P)),
                "documents_too_short": sum(len(d) < max(settings.lengths) for d in documents),
                **{str(n): score(s_P, counts_P=counts_P, documents_P=documents_P) for n, s_P in sums.items()},
            }
        }
    }
    if settings.bands and nats_PL is not None:
        result["position_nats"] = {label: by_position(nats_PL, bands=settings.bands, documents_P=documents_P)}
    if settings.sliding:
        result["sliding_perplexity"] = {
            label: slide(model, documents=documents, settings=settings, sliding=settings.sliding)
        }
    return result


def slide(
    model: PreTrainedModel, *, documents: list[np.ndarray], settings: Perplexity, sliding: Sliding
) -> dict[str, Any]:
    """The sliding protocol, by length."""
    result = {}
    for length in sorted(settings.lengths):
        windows = sliding_windows([len(d) for d in documents], length=length, sliding=sliding)
        sums = sums_of(model, documents=documents, windows=windows)
        counts = np.array([w.scored for w in windows])
        result[str(length)] = score(sums, counts_P=counts, documents_P=[w.document for w in windows])
        say(f"{length} tokens, sliding: perplexity {result[str(length)]['value']}")
    return result


def sums_of(model: PreTrainedModel, *, documents: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """`nats` of windows, of which some score more tokens than logits may be made at once: those are read in pieces."""
    sums = np.zeros(len(windows))
    parts: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        parts.setdefault(window.end - window.start if window.scored > SCORED else 0, []).append(number)
    for length, numbers in parts.items():
        part = [windows[number] for number in numbers]
        if length:
            nats_WL = token_nats(model, documents=documents, windows=part).astype(np.float64)
            sums[numbers] = [row[-w.scored :].sum() for row, w in zip(nats_WL, part, strict=True)]
        else:
            sums[numbers] = nats(model, documents=documents, windows=part)
    return sums


def write_parts(file: Path, *, chosen: list[Target], sums: dict[int, np.ndarray], last: int) -> None:
    """One row per length and place, so that models can be compared place by place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["length", "document", "end", "tokens", "nats"])
        for length, sums_P in sums.items():
            rows.writerows([length, p.document, p.end, last, f"{s:.6f}"] for p, s in zip(chosen, sums_P, strict=True))
