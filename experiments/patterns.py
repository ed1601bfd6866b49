"""Attention patterns that the paper compares S2-Attn with, as dense masks: slow, and easy to believe.

Chen et al. 2024, table 6 (patterns) and table 8 (appendix B.3, ways to shift). The library has only what a user should train
with; these are here so that the comparison can be rerun.

Letters: H query heads; L tokens; G group size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

Pattern = Literal["across-layers", "only-shifted", "dilated", "roll-back", "swapped"]


@cache
def grouped(length: int, size: int, start: int) -> torch.Tensor:
    """mask_LL of causal groups whose first border lies at `start`; what comes before it is a group of its own."""
    place_L = torch.arange(length)
    group_L = (place_L - start).div(size, rounding_mode="floor")
    return (group_L[:, None] == group_L) & (place_L[:, None] >= place_L)


@cache
def rolled_back(length: int, size: int) -> torch.Tensor:
    """mask_LL of groups after a roll by +G/2: the first group joins the end of the sequence with its start, and leaks."""
    seat_L = (torch.arange(length) + size // 2) % length
    return (seat_L[:, None] // size == seat_L // size) & (seat_L[:, None] >= seat_L)


@cache
def dilated(length: int, every: int) -> torch.Tensor:
    """mask_LL of every `every`-th token before a token, and itself."""
    distance_LL = torch.arange(length)[:, None] - torch.arange(length)
    return (distance_LL >= 0) & (distance_LL % every == 0)


@cache
def mask(pattern: Pattern, *, heads: int, length: int, size: int, layer: int) -> torch.Tensor:
    """mask_HLL: True where a query may look."""
    resting, moved = grouped(length, size, 0), grouped(length, size, size // 2)
    first, second = {
        "across-layers": (moved, moved) if layer % 2 else (resting, resting),
        "only-shifted": (moved, moved),
        "dilated": (dilated(length, length // size),) * 2,
        "roll-back": (resting, rolled_back(length, size)),
        "swapped": (moved, resting),
    }[pattern]
    return torch.stack([first] * (heads // 2) + [second] * (heads - heads // 2))


def enable(model: PreTrainedModel, pattern: Pattern, *, ratio: float) -> None:
    """Have `model` attend by `pattern` in groups of `ratio` of the length; whole rows only, no documents and no padding."""
    name = f"{pattern}_{ratio}".upper()
    AttentionInterface.register(name, attention_function(pattern, ratio))
    AttentionMaskInterface.register(name, no_mask)
    model.set_attn_implementation(name)


def no_mask(**others: Any) -> None:
    return None


def attention_function(pattern: Pattern, ratio: float) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        _, heads, length, _ = query.shape
        layer = module.layer_idx
        assert isinstance(layer, int)
        allowed_HLL = mask(pattern, heads=heads, length=length, size=round(length * ratio), layer=layer)
        out_BHLD = scaled_dot_product_attention(
            query, key, value, attn_mask=allowed_HLL, scale=scaling, enable_gqa=True
        )
        return out_BHLD.transpose(1, 2), None

    return forward
