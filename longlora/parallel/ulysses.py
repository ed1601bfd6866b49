"""Exact full attention over several processes by exchange of heads: each sees all tokens, of its share of the heads.

Jacobs et al. 2023, "DeepSpeed Ulysses". Twice a layer all of q, k, v and the output change hands, so it costs far more traffic than
S2-Attn's half group (docs/gpus.md counts both); it serves the steps that train in full attention.
tests/test_sequence_parallel.py holds it to one process.

Letters: B batch; L tokens; P processes; S = L/P tokens of this process; H query heads; K key/value heads; D head dimension.
"""

from typing import Any

import torch
from torch import distributed

from longlora.attention.kernels import BackendName
from longlora.attention.shifted import shifted_sparse_attention
from longlora.parallel.layout import head_misfits
from longlora.section import refuse


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
    """out_BSHD: causal attention over all L tokens, for the tokens of this process.

    Raises:
        ValueError: the key/value heads cannot be shared out equally.
    """
    processes, kv_heads = distributed.get_world_size(group), k_BKSD.shape[1]
    refuse(head_misfits(kv_heads, degree=processes))
    q_BhLD, k_BkLD, v_BkLD = (Exchange.apply(x, group) for x in (q_BHSD, k_BKSD, v_BKSD))
    out_BLhD = shifted_sparse_attention(
        q_BhLD,
        k_BkLD,
        v_BkLD,
        group_size=q_BhLD.shape[2],
        document_ids_BL=document_ids_BL,
        scaling=scaling,
        backend=backend,
    )
    out_BSHD = Exchange.apply(out_BLhD, group)
    assert isinstance(out_BSHD, torch.Tensor)
    return out_BSHD


def exchange(x: torch.Tensor, *, cut: int, join: int, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Dimension `cut` shared out to the processes, dimension `join` put together from theirs."""
    processes = distributed.get_world_size(group)
    leaving = x.unflatten(cut, (processes, -1)).movedim(cut, 0).contiguous()  # first the process it is for
    coming = torch.empty_like(leaving)
    distributed.all_to_all_single(coming, leaving, group=group)
    return coming.movedim(0, join).flatten(join, join + 1)


class Exchange(torch.autograd.Function):
    """Of q, k, v the heads are shared out and the tokens put together, of the output the other way round; gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return exchange(x, cut=1, join=2, group=group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return exchange(grads[0], cut=2, join=1, group=ctx.group), None
