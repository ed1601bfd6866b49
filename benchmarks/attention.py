"""Attention alone, forward and backward: S2-Attn against full causal SDPA and against the authors' roll and mask, side by side.

Letters: B batch; L tokens; H heads; D head dimension; G group; N groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.fresh import rise_mb
from benchmarks.turns import Cases, Sizes, take_turns
from longlora.attention.groups import group_size
from longlora.attention.shifted import shifted_sparse_attention

HEADS, DIM, RATIO = 8, 64, 0.25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def s2(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    out_BLHD = shifted_sparse_attention(q_BHLD, k_BHLD, v_BHLD, group_size=group_size(q_BHLD.shape[2], RATIO))
    return out_BLHD.transpose(1, 2)


def full(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)


def roll_and_mask(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper: roll half of the heads, fold the groups into the batch, attend as usual, unfold, roll back."""
    batch, heads, length, dim = q_BHLD.shape
    group = group_size(length, RATIO)

    def rolled(x_BHLD: torch.Tensor, by: int) -> torch.Tensor:
        still, moved = x_BHLD.chunk(2, dim=1)
        return torch.cat([still, moved.roll(by, dims=2)], dim=1)

    q, k, v = (
        rolled(x, -group // 2).transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)
        for x in (q_BHLD, k_BHLD, v_BHLD)
    )
    mask_GG = torch.full((group, group), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    scores_NHGG = q @ k.transpose(-1, -2) * dim**-0.5 + mask_GG
    out_NHGD = scores_NHGG.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    out_BHLD = out_NHGD.transpose(1, 2).reshape(batch, length, heads, dim).transpose(1, 2)
    return rolled(out_BHLD, group // 2)


METHODS: dict[str, Attend] = {"s2": s2, "full": full, "roll_and_mask": roll_and_mask}


def prepared(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and an output gradient, laid out as a transformer does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, length, HEADS, DIM, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def once(method: Attend, inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
    """One forward and backward."""
    torch.autograd.grad(method(*inputs), inputs, grad)


def fits(length: int, dtype: torch.dtype) -> bool:
    """Whether roll and mask's scores, some five copies of N x H x G x G at its peak, leave a fifth of the free memory alone."""
    group = group_size(length, RATIO)
    return 5 * length * group * HEADS * (dtype.itemsize + 2) < 0.8 * psutil.virtual_memory().available


def alone(name: str, length: str, dtype: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For benchmarks.fresh."""
    inputs, grad = prepared(int(length), DTYPES[dtype])
    small = [x[:, :, :64] for x in inputs]
    return partial(once, METHODS[name], small, grad[:, :, :64]), partial(once, METHODS[name], inputs, grad)


def measure(length: int, dtype: str, *, patience: float) -> dict[str, Any]:
    """Times and, in float32 (in 16 bit it is half), peak memory."""
    inputs, grad = prepared(length, DTYPES[dtype])
    methods = {n: m for n, m in METHODS.items() if n != "roll_and_mask" or fits(length, DTYPES[dtype])}
    for method in methods.values():  # first calls allocate and compile
        once(method, [x[:, :, :512] for x in inputs], grad[:, :, :512])
    result = take_turns({n: partial(once, m, inputs, grad) for n, m in methods.items()}, ours="s2", patience=patience)
    for name, said in result.items() if dtype == "float32" else ():
        said["peak_mb"] = rise_mb("attention", name, length, dtype)
    return {"length": length, "dtype": dtype, "methods": result}


def cases(sizes: Sizes) -> Cases:
    return {f"{d} {n}": partial(measure, n, d, patience=sizes.patience) for d, n in sizes.pairs()}
