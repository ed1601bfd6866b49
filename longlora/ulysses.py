"""Exact full attention over several processes by exchange of heads: each sees all tokens, of its share of the heads.

Jacobs et al. 2023, "DeepSpeed Ulysses". Twice a layer all of q, k, v and the output change hands, so it costs far more traffic than
S2-Attn's half group (docs/gpus.md counts both); it serves the steps that train in full attention.
tests/test_sequence_parallel.py holds it to one process.

Letters: B batch; L tokens; P processes; S = L/P tokens of this process; H query heads; K key/value heads; D head dimension.
"""

import math
from typing import Any

import torch
from torch import distributed

from longlora.attention import shifted_sparse_attention
from longlora.kernels import BackendName


def full_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    group: distributed.ProcessGroup | None,
    document_ids_BL: torch.Tensor | None,
    scaling: float | None,
    backend: BackendName,
) -> torch.Tensor:
    """out_BHSD: causal attention over all L tokens, for the tokens of this process.

    Raises:
        ValueError: the key/value heads can not be shared out equally.
    """
    processes, kv_heads = distributed.get_world_size(group), k_BKSD.shape[1]
    if kv_heads % processes:
        raise ValueError(
            f"full attention shares {kv_heads} key/value heads out to {processes} processes: LONGLORA_SEQUENCE_PARALLEL must "
            f"divide {kv_heads}, the nearest is {math.gcd(kv_heads, processes)}; or set attention.full_attention_last: 0"
        )
    q_BhLD, k_BkLD, v_BkLD = (Heads.apply(x, group) for x in (q_BHSD, k_BKSD, v_BKSD))
    out_BhLD = shifted_sparse_attention(
        q_BhLD,
        k_BkLD,
        v_BkLD,
        group_size=q_BhLD.shape[2],
        document_ids_BL=document_ids_BL,
        scaling=scaling,
        backend=backend,
    )
    out_BHSD = Tokens.apply(out_BhLD, group)
    assert isinstance(out_BHSD, torch.Tensor)
    return out_BHSD


def to_heads(x_BHSD: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """x_BhLD: of the heads a P-th, of the tokens all."""
    processes = distributed.get_world_size(group)
    leaving_PBhSD = x_BHSD.unflatten(1, (processes, -1)).movedim(1, 0).contiguous()
    coming_PBhSD = torch.empty_like(leaving_PBhSD)
    distributed.all_to_all_single(coming_PBhSD, leaving_PBhSD, group=group)
    return coming_PBhSD.movedim(0, 2).flatten(2, 3)


def to_tokens(x_BhLD: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """x_BHSD: of the tokens a P-th, of the heads all."""
    processes = distributed.get_world_size(group)
    leaving_PBhSD = x_BhLD.unflatten(2, (processes, -1)).movedim(2, 0).contiguous()
    coming_PBhSD = torch.empty_like(leaving_PBhSD)
    distributed.all_to_all_single(coming_PBhSD, leaving_PBhSD, group=group)
    return coming_PBhSD.movedim(0, 1).flatten(1, 2)


class Heads(torch.autograd.Function):
    """`to_heads`, and back for the gradients."""

    @staticmethod
    def forward(ctx: Any, x_BHSD: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return to_heads(x_BHSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return to_tokens(grads[0], ctx.group), None


class Tokens(torch.autograd.Function):
    """`to_tokens`, and back for the gradients."""

    @staticmethod
    def forward(ctx: Any, x_BhLD: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return to_tokens(x_BhLD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return to_heads(grads[0], ctx.group), None
