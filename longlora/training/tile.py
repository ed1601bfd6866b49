"""The feed-forward a tile of tokens at a time: the widest activations of a layer exist for one tile only.

The feed-forward looks at each token alone, so it may be cut along the sequence. A tile keeps its input and is computed again when
its gradient is asked for (torch.utils.checkpoint): 3 b F bytes per token (F its width, b of a number) shrink from the sequence to
the tile, for one more forward of this part. The idea is Arctic's TiledMLP (Bekman et al. 2025, arXiv 2506.13996), whose code needs
DeepSpeed. tests/test_tile.py holds values and gradients to the feed-forward in one piece.

Letters: B batch; L tokens; D hidden size.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longlora.model.quiet_peft import PeftModel

GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
"""Children by which a gated feed-forward is known: Llama, Mistral, Qwen, Gemma; Phi-3 and GLM have gate and up in one."""


def tile_mlp(model: nn.Module, *, tile: int) -> None:
    """Have every gated feed-forward of `model` take at most `tile` tokens at once.

    No weight moves and none changes its name. Low-rank adapters inside and gradient checkpointing around stay as they are.

    Raises:
        ValueError: a tile of no token, or a model without a gated feed-forward.
    """
    if tile < 1:
        raise ValueError(f"fit.mlp_tile = {tile}: at least 1 token, or null for the whole sequence at once")
    found = [m for m in model.modules() if any(names <= {n for n, _ in m.named_children()} for names in GATED)]
    if not found:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        raise ValueError(
            f"fit.mlp_tile: {type(inner).__name__} has no gated feed-forward (gate_proj, up_proj, down_proj); set it to null"
        )
    for module in found:
        module.forward = tiled(module.forward, tile=tile)


def tiled(forward: Callable[[torch.Tensor], torch.Tensor], *, tile: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """`forward` of one tensor, (B, L, D) or (L, D), in tiles along L."""

    def by_tiles(x_BLD: torch.Tensor) -> torch.Tensor:
        if x_BLD.shape[-2] <= tile:
            return forward(x_BLD)
        parts = []
        for x in x_BLD.split(tile, dim=-2):
            out = checkpoint(forward, x, use_reentrant=False)
            assert isinstance(out, torch.Tensor)
            parts.append(out)
        return torch.cat(parts, dim=-2)

    return by_tiles
