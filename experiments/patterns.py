"""Attention patterns that S2-Attn is compared with: the paper's, and two that might close its gap to full attention.

The paper's: Chen et al. 2024, table 6 (patterns) and table 8 (appendix B.3, ways to shift). The others: groups whose borders
lie elsewhere in every layer and step, and groups that see the sequence's first tokens besides (attention sinks, Xiao et al.
2024). The library has only what a user should train with; these are here so that the comparison can be rerun.
tests/test_experiments.py holds each to a dense mask.

Letters: B batch; H query heads; K key/value heads; L tokens; D head dimension; G group size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longlora.attention.shifted import Attention
from longlora.training import fit

Pattern = Literal["across-layers", "only-shifted", "dilated", "roll-back", "swapped", "wandering", "sinks"]
Way = Callable[[torch.Tensor, int], torch.Tensor]
"""From qkv_3BHLD and G to out_BHLD."""
SINKS = 4
"""As many first tokens as Xiao et al. 2024 (arXiv 2309.17453) keep."""


def causal(qkv_3BHLD: torch.Tensor) -> torch.Tensor:
    q_BHLD, k_BHLD, v_BHLD = qkv_3BHLD
    return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)


def resting(qkv_3BHLD: torch.Tensor, size: int) -> torch.Tensor:
    """Inside the groups [0, G), [G, 2G), ..."""
    parts = qkv_3BHLD.unflatten(3, (-1, size)).transpose(2, 3).flatten(1, 2)  # a group is a row of the batch
    return causal(parts).unflatten(0, (qkv_3BHLD.shape[1], -1)).transpose(1, 2).flatten(2, 3)


def moved(qkv_3BHLD: torch.Tensor, size: int, by: int | None = None) -> torch.Tensor:
    """Inside the groups [0, M), [M, M + G), ... and what is left at the end, where M = `by` < G; half a group if not said."""
    by = size // 2 if by is None else by
    if by == 0:
        return resting(qkv_3BHLD, size)
    first, middle, last = qkv_3BHLD.split([by, qkv_3BHLD.shape[3] - size, size - by], dim=3)
    return torch.cat([causal(first), resting(middle, size), causal(last)], dim=2)


def wandering(qkv_3BHLD: torch.Tensor, size: int) -> torch.Tensor:
    """Inside groups that begin at a random place: another in each layer, step and half of the heads."""
    return moved(qkv_3BHLD, size, by=int(torch.randint(size, ())))


def with_sinks(way: Way) -> Way:
    """Inside the groups of `way`, and to the first `SINKS` tokens from everywhere."""

    def both(qkv_3BHLD: torch.Tensor, size: int) -> torch.Tensor:
        q_BHLD, k_BHLD, v_BHLD = qkv_3BHLD
        place_L = torch.arange(q_BHLD.shape[2])
        start = size // 2 if way is moved else 0
        group_L = (place_L - start) // size
        seen_LL = (group_L[:, None] == group_L) | (place_L < SINKS)
        seen_LL &= place_L[:, None] >= place_L
        return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=seen_LL)

    return both


def rolled_back(qkv_3BHLD: torch.Tensor, size: int) -> torch.Tensor:
    """Inside groups after a roll by +G/2: the first one joins the end of the sequence with its start, and leaks."""
    return resting(qkv_3BHLD.roll(size // 2, dims=3), size).roll(-(size // 2), dims=2)


def dilated(qkv_3BHLD: torch.Tensor, size: int) -> torch.Tensor:
    """To as many tokens as a group has, evenly over all that came before."""
    every = qkv_3BHLD.shape[3] // size
    parts = qkv_3BHLD.unflatten(3, (size, every)).movedim(4, 2).flatten(1, 2)
    return causal(parts).unflatten(0, (qkv_3BHLD.shape[1], every)).movedim(1, 3).flatten(2, 3)


def halves(pattern: Pattern, layer: int) -> tuple[Way, Way]:
    """How the first half of the heads attends, and how the second."""
    match pattern:
        case "across-layers":
            return (moved, moved) if layer % 2 else (resting, resting)
        case "only-shifted":
            return moved, moved
        case "dilated":
            return dilated, dilated
        case "roll-back":
            return resting, rolled_back
        case "swapped":
            return moved, resting
        case "wandering":
            return wandering, wandering
        case "sinks":
            return with_sinks(resting), with_sinks(moved)


def attend(
    q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, *, pattern: Pattern, size: int, layer: int
) -> torch.Tensor:
    """out_BHLD of whole rows, without documents and without padding; L is a multiple of G."""
    repeat = q_BHLD.shape[1] // k_BKLD.shape[1]
    qkv_3BHLD = torch.stack([q_BHLD, k_BKLD.repeat_interleave(repeat, 1), v_BKLD.repeat_interleave(repeat, 1)])
    first, second = halves(pattern, layer)
    half = q_BHLD.shape[1] // 2
    return torch.cat([first(qkv_3BHLD[:, :, :half], size), second(qkv_3BHLD[:, :, half:], size)], dim=1)


@contextmanager
def in_place_of_s2(pattern: Pattern) -> Iterator[None]:
    """Have models that are fine-tuned meanwhile attend by `pattern`."""

    enable_as_said = fit.enable

    def enable(model: PreTrainedModel, attention: Attention) -> None:
        if attention.pattern == "full":  # the last steps
            return enable_as_said(model, attention)
        name = f"{pattern}_{attention.group_ratio}".upper()
        AttentionInterface.register(name, attention_function(pattern, attention.group_ratio))
        AttentionMaskInterface.register(name, no_mask)
        model.set_attn_implementation(name)

    with mock.patch.object(fit, "enable", enable):
        yield


def no_mask(**others: Any) -> None:
    return None


def attention_function(pattern: Pattern, ratio: float) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        assert isinstance(layer, int)
        out_BHLD = attend(query, key, value, pattern=pattern, size=round(query.shape[2] * ratio), layer=layer)
        return out_BHLD.transpose(1, 2), None

    return forward
