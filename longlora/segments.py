"""Which tokens attend together: for one half of the heads, the tokens of all rows as segments, each causal in itself.

Groups, moved groups, documents and padding all come down to this, so a kernel needs to know nothing else.

Letters: B batch; L tokens of a row; T = B x L; S the tokens that attend, some of the T; H query heads; K key/value heads.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Shift = Literal["boundaries", "roll", "none"]


@dataclass(frozen=True)
class Segments:
    """Segments by their consecutive lengths."""

    order: torch.Tensor | None
    """Indices of S tokens, which the segments consist of; None: of all T as they are, so that views will do."""
    lengths: list[int]

    def runs(self) -> Iterator[tuple[slice | torch.Tensor, int]]:
        """Per run of equally long segments: an index to its tokens, and how many segments it has."""
        start = 0
        for length, equal in itertools.groupby(self.lengths):
            count = len(list(equal))
            tokens = slice(start, start + length * count)
            yield tokens if self.order is None else self.order[tokens], count
            start = tokens.stop


@dataclass(frozen=True)
class Part:
    """Query heads with one pattern, the key/value heads they read, and the pattern."""

    heads: slice
    kv_heads: slice
    segments: Segments


def parts(heads: int, kv_heads: int, *, first: Segments, second: Segments) -> list[Part]:
    """`first` for heads [0, H//2), `second` for [H//2, H). A key/value head that both halves read makes a part in each."""
    if first is second:
        return [Part(slice(0, heads), slice(0, kv_heads), first)]
    shared = heads // kv_heads
    cut = heads // 2
    edges = sorted({0, cut // shared * shared, cut, -(-cut // shared) * shared, heads})
    return [
        Part(slice(a, b), slice(a // shared, -(-b // shared)), first if b <= cut else second)
        for a, b in itertools.pairwise(edges)
    ]


def segment(
    batch: int,
    length: int,
    *,
    group_size: int,
    shift: Shift,
    document_ids_BL: torch.Tensor | None,
    device: torch.device,
) -> Segments:
    """Groups of `group_size` tokens in each of `batch` rows of `length` tokens, moved by `shift`, cut where documents meet.

    `device` is where the tokens are, and so the order; the ids may be anywhere, and are read on the CPU.
    """
    half = group_size // 2
    if document_ids_BL is None and shift != "roll":
        edges = [0, *range((half if shift == "boundaries" else 0) or group_size, length, group_size), length]
        return Segments(None, [b - a for a, b in itertools.pairwise(edges)] * batch)
    order_T = torch.arange(batch * length).view(batch, length).roll(-half if shift == "roll" else 0, 1).flatten()
    group_L = (torch.arange(length) - (half if shift == "boundaries" else 0)).div(group_size, rounding_mode="floor")
    group_T = (group_L + torch.arange(0, batch * (length + 2), length + 2)[:, None]).flatten()
    if document_ids_BL is None:
        return Segments(order_T.to(device), runs_of(group_T)[1].tolist())
    ids_T = document_ids_BL.cpu().flatten()[order_T]
    order_S, group_S, ids_S = (x_T[ids_T >= 0] for x_T in (order_T, group_T, ids_T))
    known, document_S = ids_S.unique(return_inverse=True)
    key_S = group_S * (len(known) + 1) + document_S
    keys, lengths = runs_of(key_S)
    if len(keys.unique()) < len(keys):  # a document that comes back after another: bring its tokens together
        sorting_S = key_S.argsort(stable=True)
        order_S, lengths = order_S[sorting_S], runs_of(key_S[sorting_S])[1]
    in_place = torch.equal(order_S, torch.arange(batch * length))
    return Segments(None if in_place else order_S.to(device), lengths.tolist())


def runs_of(key_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the runs of equal neighbours, and the runs' lengths."""
    return torch.unique_consecutive(key_S, return_counts=True)
