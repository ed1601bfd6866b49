"""Which tokens attend together: for one half of the heads, the tokens of all rows as segments, each causal in itself.

Groups, moved groups, documents and padding all come down to this, so a kernel needs to know nothing else.

Letters: B batch; L tokens of a row; T = B x L; S the tokens that attend, some of the T; H query heads; K key/value heads.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig

T = TypeVar("T")
Shift = Literal["boundaries", "roll", "none"]
KNOWN = WeakTensorKeyDictionary()
"""What was worked out of document ids, as long as these live."""


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
    shared, cut = heads // kv_heads, heads // 2
    return [
        *some_parts(0, cut, origin=0, shared=shared, segments=first),
        *some_parts(cut, heads, origin=0, shared=shared, segments=second),
    ]


def some_parts(first: int, last: int, *, origin: int, shared: int, segments: Segments) -> list[Part]:
    """Query heads [first, last) of a model with the key/value heads that they read, `shared` query heads to one; head `origin`
    and the one that it reads are number 0.

    A key/value head that only some of its query heads read makes a part of its own.
    """
    between = {-(-first // shared) * shared, last // shared * shared}
    edges = sorted({first, last} | {e for e in between if first < e < last})
    base = origin // shared
    return [
        Part(slice(a - origin, b - origin), slice(a // shared - base, -(-b // shared) - base), segments)
        for a, b in itertools.pairwise(edges)
    ]


def segment(
    batch: int, length: int, *, group_size: int, shift: Shift, document_ids_BL: torch.Tensor | None
) -> Segments:
    """Groups of `group_size` tokens in each of `batch` rows of `length` tokens, moved by `shift`, cut where documents meet."""
    half = group_size // 2
    if document_ids_BL is None and shift != "roll":
        edges = [0, *range((half if shift == "boundaries" else 0) or group_size, length, group_size), length]
        return Segments(None, [b - a for a, b in itertools.pairwise(edges)] * batch)
    if document_ids_BL is None:
        return segment_rows(batch, length, group_size=group_size, shift=shift, document_ids_BL=None)
    return remembered(
        document_ids_BL,
        (segment, batch, length, group_size, shift),
        lambda: segment_rows(batch, length, group_size=group_size, shift=shift, document_ids_BL=document_ids_BL),
    )


def remembered(ids: torch.Tensor, what: tuple[Any, ...], make: Callable[[], T]) -> T:
    """`make()`, called once for these `ids` (or for this view of them) and for `what`: a layer asks as the one before it did, and
    each answer takes a GPU's queue to its end. Ids that were changed in place are other ids."""
    whole = ids if ids._base is None else ids._base
    version = 0 if whole.is_inference() else whole._version
    known = KNOWN.setdefault(whole, {})
    assert known is not None
    key = (version, ids.storage_offset(), ids.shape, ids.stride(), *what)
    if key not in known:
        with torch.inference_mode(False):  # a training may ask next
            known[key] = make()
    return known[key]


def one_document(document_ids_BL: torch.Tensor) -> bool:
    """Whether each row is one document without padding."""
    return remembered(
        document_ids_BL,
        (one_document,),
        lambda: bool(((document_ids_BL == document_ids_BL[:, :1]) & (document_ids_BL >= 0)).all()),
    )


def segment_rows(
    batch: int, length: int, *, group_size: int, shift: Shift, document_ids_BL: torch.Tensor | None
) -> Segments:
    """As `segment`, token by token."""
    half = group_size // 2
    order_BL = torch.arange(batch * length).view(batch, length).roll(-half if shift == "roll" else 0, 1)
    group_L = (torch.arange(length) - (half if shift == "boundaries" else 0)).div(group_size, rounding_mode="floor")
    group_BL = group_L + torch.arange(0, batch * (length + 2), length + 2)[:, None]
    if document_ids_BL is None:
        return Segments(order_BL.flatten(), runs_of(group_BL.flatten())[1].tolist())
    ids_T = document_ids_BL.flatten().cpu()[order_BL.flatten()]
    alive_T = ids_T >= 0
    known, document_S = ids_T[alive_T].unique(return_inverse=True)
    key_S = group_BL.flatten()[alive_T] * (len(known) + 1) + document_S
    order_S = order_BL.flatten()[alive_T]
    keys, lengths = runs_of(key_S)
    if len(keys.unique()) < len(keys):  # a document that comes back after another: bring its tokens together
        sorting_S = key_S.argsort(stable=True)
        order_S, lengths = order_S[sorting_S], runs_of(key_S[sorting_S])[1]
    in_place = len(order_S) == batch * length and bool((order_S == torch.arange(len(order_S))).all())
    return Segments(None if in_place else order_S.to(document_ids_BL.device), lengths.tolist())


def runs_of(key_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the runs of equal neighbours, and the runs' lengths."""
    return torch.unique_consecutive(key_S, return_counts=True)


def document_ids(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    check_window: Callable[..., None] | None = None,
    **others: Any,  # transformers hands every mask function all it has
) -> torch.Tensor | None:
    """document_ids_BL, in place of a mask and in a mask's signature; None: one document per row and no padding.

    `mask_function(b, h, q, kv)` is transformers' description of a mask, element by element. A document begins where a token
    does not see the one before it; where one does not see all of its own, there is a sliding window of `local_size` tokens, which
    `check_window` is asked about.

    Raises:
        ValueError: there is a cache, or some token sees the one after it; or what `check_window` raises.
    """
    if q_length != kv_length:
        raise ValueError(
            f"S2-Attn takes no cache ({q_length} queries, {kv_length} keys): use disable(model) to generate"
        )
    row_B1 = torch.arange(batch_size, device=device)[:, None]
    before_1L = torch.arange(q_length - 1, device=device)[None]
    if bool(mask_function(row_B1, 0, before_1L, before_1L + 1).any()):
        raise ValueError("S2-Attn is causal, and this model lets some tokens see the ones after them")
    begins_BL = ~mask_function(row_B1, 0, before_1L + 1, before_1L).expand(batch_size, -1)
    ids_BL = nn.functional.pad(begins_BL.cumsum(1), (1, 0))
    # some windows are in the config, and made for no layer
    taken = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if check_window and taken and local_size and local_size < q_length:
        far_1L = before_1L[:, : q_length - local_size]
        hidden_BL = ~mask_function(row_B1, 0, far_1L + local_size, far_1L)
        if bool((hidden_BL & (ids_BL[:, local_size:] == ids_BL[:, :-local_size])).any()):
            check_window(local_size, length=q_length)
    if not begins_BL.any() and (attention_mask is None or attention_mask.all()):
        return None
    return ids_BL if attention_mask is None else ids_BL.masked_fill(~attention_mask, -1)


def no_padding(*, attention_mask: torch.Tensor | None = None, **others: Any) -> None:
    """In place of a mask where a process holds a piece of a sequence. Raises ValueError: there is padding."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("a sequence that several processes hold together cannot be padded; pack documents instead")
