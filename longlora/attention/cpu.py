"""PyTorch's fused CPU attention on views of q, k, v, written straight into one output and one set of gradients.

Through autograd the pieces would be joined twice in each direction, which at 8192 tokens takes a tenth of the time, and kept
twice. tests/test_kernels.py holds values and gradients to a dense reference in float64.

Letters: T tokens of all rows; S tokens of some segments; H query heads; K key/value heads; h some of them; D head dimension; N
segments of G tokens each.
"""

from functools import lru_cache
from typing import Any

import torch

from longlora.attention.segments import Part

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, *, parts: list[Part], scaling: float
) -> torch.Tensor:
    """out_THD: each part's heads attend causally inside its segments; tokens in no segment get zeros."""
    out_THD = CpuAttention.apply(dense_last(q_THD), dense_last(k_TKD), dense_last(v_TKD), parts, scaling)
    assert isinstance(out_THD, torch.Tensor)
    return out_THD


class CpuAttention(torch.autograd.Function):
    """The kernel takes grouped queries as they are, and needs the output and the scores' log-sums to go backward."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, parts: list[Part], scaling: float
    ) -> torch.Tensor:
        out_THD = blank(q_THD, parts)
        sums = []
        for part in parts:
            for tokens, count in part.segments.runs():
                q_NhGD = fold(q_THD[tokens, part.heads], count)
                k_NhGD, v_NhGD = (fold(x[tokens, part.kv_heads], count) for x in (k_TKD, v_TKD))
                out_NhGD, sum_NhG = kernel(q_NhGD, k_NhGD, v_NhGD, 0.0, True, scale=scaling)
                out_THD[tokens, part.heads] = unfold(out_NhGD)
                sums.append(sum_NhG)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *sums)
        ctx.parts, ctx.scaling = parts, scaling
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, out_THD, *sums = ctx.saved_tensors
        grad_THD = dense_last(grads[0])
        dq_THD, dk_TKD, dv_TKD = (blank(x, ctx.parts) for x in (q_THD, k_TKD, v_TKD))
        exact = torch.float32 if half_is_emulated() and q_THD.dtype.itemsize == 2 else q_THD.dtype
        left = iter(sums)
        written = 0  # key/value heads that have their gradient: a part that reads one of them again adds to it
        for part in ctx.parts:
            again, written = part.kv_heads.start < written, part.kv_heads.stop
            for tokens, count in part.segments.runs():
                grad_NhGD, q_NhGD, out_NhGD = (
                    fold(x[tokens, part.heads], count).to(exact) for x in (grad_THD, q_THD, out_THD)
                )
                k_NhGD, v_NhGD = (fold(x[tokens, part.kv_heads], count).to(exact) for x in (k_TKD, v_TKD))
                dq_NhGD, dk_NhGD, dv_NhGD = kernel_backward(
                    grad_NhGD, q_NhGD, k_NhGD, v_NhGD, out_NhGD, next(left), 0.0, True, scale=ctx.scaling
                )
                dq_THD[tokens, part.heads] = unfold(dq_NhGD).to(dq_THD.dtype)
                for total_TKD, new_NhGD in ((dk_TKD, dk_NhGD), (dv_TKD, dv_NhGD)):
                    new_ShD = unfold(new_NhGD).to(total_TKD.dtype)
                    if again:
                        total_TKD[tokens, part.kv_heads] += new_ShD
                    else:
                        total_TKD[tokens, part.kv_heads] = new_ShD
        return dq_THD, dk_TKD, dv_TKD, None, None


def fold(x_ShD: torch.Tensor, count: int) -> torch.Tensor:
    """x_NhGD: `count` equally long segments as a batch; a view."""
    return x_ShD.unflatten(0, (count, -1)).transpose(1, 2)


def unfold(x_NhGD: torch.Tensor) -> torch.Tensor:
    """x_ShD."""
    return x_NhGD.transpose(1, 2).flatten(0, 1)


def dense_last(x_THD: torch.Tensor) -> torch.Tensor:
    """As it is where the head dimension is dense in memory, which the kernels rely on. The gradient of a sum is not."""
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def blank(x_THD: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    """Room for a result like `x_THD`: zeros where some token will not be written."""
    make = torch.empty if all(p.segments.order is None for p in parts) else torch.zeros
    return make(x_THD.shape, dtype=x_THD.dtype)


@lru_cache
def half_is_emulated() -> bool:
    """Whether this CPU lacks instructions for 16 bit numbers: the backward kernel then takes seven times as long as in float32."""
    able = torch.cpu.get_capabilities()
    return able["architecture"] == "x86_64" and not (able["avx512_bf16"] or able["amx_bf16"])
