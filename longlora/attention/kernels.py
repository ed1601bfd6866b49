"""Causal attention inside segments, on whichever kernel the machine has. No mask is held, no key/value head is repeated.

`sdpa` is PyTorch's fused attention: on a CPU longlora/attention/cpu.py, elsewhere scaled_dot_product_attention. `flash` (the
flash-attn package, version 2, 3 or 4, or a kernel of it through transformers and `kernels`), `varlen`
(torch.nn.attention.varlen) and `flex` (FlexAttention, compiled) need CUDA. tests/test_kernels.py holds the first to a dense
reference, and the others to their call contract, with a reference in place of the kernel; tests/test_cuda.py has them for real.

Letters: T tokens of all rows; S tokens of some segments; H query heads; K key/value heads; h some of them; D head dimension; N
segments of G tokens each, or blocks of tokens; M = N + 1 cumulative lengths.
"""

import importlib.util
import itertools
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from longlora.attention import cpu
from longlora.attention.cpu import fold, unfold
from longlora.attention.segments import Part

Backend = Literal["sdpa", "flash", "varlen", "flex"]
BackendName = Literal["auto", "sdpa", "flash", "varlen", "flex"]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[int], float], torch.Tensor]

BACKENDS: tuple[Backend, ...] = ("flash", "varlen", "sdpa", "flex")
"""In the order that auto prefers for documents, which are one call for the first two, and one per run of equal lengths for sdpa.
Without documents there are three runs at most, and sdpa comes first: on an H200 it took 0.55 to 0.65 of varlen's time from 16,384
tokens on (docs/gpus.md)."""
FLASH: dict[str, tuple[Callable[[], bool], range]] = {
    "flash_attention_4": (is_flash_attn_4_available, range(9, 100)),
    "flash_attention_3": (is_flash_attn_3_available, range(9, 10)),
    "flash_attention_2": (is_flash_attn_2_available, range(8, 100)),
}
"""By transformers' names, the newest first: whether the package is there, and the generations (the first number of a compute
capability) that it has kernels for: version 3 is Hopper's alone, and on a later GPU fails when it is called."""
HALF = (torch.float16, torch.bfloat16)
FLEX_BLOCK = 128

log = logging.getLogger(__name__)


@lru_cache
def choose(name: str, *, device: str, dtype: torch.dtype, head_dim: int, documents: bool) -> Backend:
    """The backend that `name` stands for with such tensors, in which there are `documents` or not; said once in the log.

    Raises:
        ValueError: there is no such backend, or it cannot run on them.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend '{name}': there are auto, {', '.join(BACKENDS)}")
    obstacles: dict[Backend, str | None] = {
        b: needs(b, device=device, dtype=dtype, head_dim=head_dim, asked=name == b) for b in BACKENDS
    }
    if name == "auto" and not documents:
        obstacles = {"sdpa": None}
    for backend, obstacle in obstacles.items():
        if obstacle and name == backend:
            raise ValueError(
                f"attention backend '{name}' needs {obstacle}, not {dtype} on {device}; 'sdpa' runs anywhere"
            )
        if obstacle is None and name in (backend, "auto"):
            where = "with" if documents else "without"
            log.info(
                "attention %s documents runs on '%s' (%s, %s, heads of %d)", where, backend, device, dtype, head_dim
            )
            return backend
    raise AssertionError("sdpa runs anywhere")


def needs(backend: Backend, *, device: str, dtype: torch.dtype, head_dim: int, asked: bool) -> str | None:
    """What the backend lacks here, in words; None: nothing. Unless `asked` for, nothing that would download is counted as there."""
    if backend == "sdpa" or (backend == "flex" and device == "cuda"):
        return None
    if backend == "flex":
        return "CUDA"
    fits = device == "cuda" and dtype in HALF and head_dim <= 256 and head_dim % 8 == 0
    if backend == "flash":
        there = fits and (flash_version() or (asked and installed("kernels")))
        return None if there else "CUDA, 16 bit numbers, heads of a multiple of 8 up to 256, and flash-attn or kernels"
    able = fits and torch.cuda.get_device_capability() >= (8, 0)
    return None if able else "CUDA of compute capability 8.0, 16 bit numbers and heads of a multiple of 8 up to 256"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def flash_version() -> str | None:
    """The newest flash-attn that is installed and runs on this GPU, by transformers' name; None: there is none."""
    generation, _ = torch.cuda.get_device_capability()
    return next((name for name, (there, kernels) in FLASH.items() if generation in kernels and there()), None)


def attend(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    parts: list[Part],
    scaling: float,
    backend: Backend,
) -> torch.Tensor:
    """out_THD: each part's heads attend causally inside its segments; tokens in no segment get zeros.

    The parts' heads follow one another and are all the heads.
    """
    if backend == "sdpa" and q_THD.device.type == "cpu":
        return cpu.attend(q_THD, k_TKD, v_TKD, parts=parts, scaling=scaling)
    kernel = KERNELS[backend]
    outs = []
    for part, q_ThD in zip(parts, q_THD.split([p.heads.stop - p.heads.start for p in parts], dim=1), strict=True):
        tensors = (q_ThD, k_TKD[:, part.kv_heads], v_TKD[:, part.kv_heads])
        order_S, lengths = part.segments.order, part.segments.lengths
        if order_S is None:
            outs.append(kernel(*tensors, lengths, scaling))
        else:
            q_ShD, k_ShD, v_ShD = (x[order_S] for x in tensors)
            # Nothing but padding still belongs to the graph.
            out_ShD = kernel(q_ShD, k_ShD, v_ShD, lengths, scaling) if lengths else q_ShD + k_ShD.sum() + v_ShD.sum()
            outs.append(torch.zeros_like(q_ThD).index_copy(0, order_S, out_ShD))
    return torch.cat(outs, dim=1)


def sdpa(
    q_SHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, once per run of equally long segments.

    Query heads that share key/value heads take turns: of its fused kernels only some know grouped queries, and the others
    would repeat the keys.
    """
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    kv_heads = k_SKD.shape[1]
    outs = []
    for (_, count), q, k, v in zip(runs, q_SHD.split(sizes), k_SKD.split(sizes), v_SKD.split(sizes), strict=True):
        turns = q.unflatten(1, (kv_heads, -1)).unbind(2)
        k_NKGD, v_NKGD = fold(k, count), fold(v, count)
        attended = [
            unfold(scaled_dot_product_attention(fold(turn, count), k_NKGD, v_NKGD, is_causal=True, scale=scaling))
            for turn in turns
        ]
        outs.append(torch.stack(attended, dim=2).flatten(1, 2) if len(turns) > 1 else attended[0])
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def flash(
    q_SHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """flash_attn_varlen_func of flash-attn 2 and later: grouped queries by shape, segments by cumulative lengths."""
    cumulative_M = cumulative(tuple(lengths), device=q_SHD.device)
    longest = max(lengths)
    out = flash_attn_varlen()(
        q_SHD,
        k_SKD,
        v_SKD,
        cu_seqlens_q=cumulative_M,
        cu_seqlens_k=cumulative_M,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out  # 4 gives the sums' logarithms too


@lru_cache
def flash_attn_varlen() -> Callable[..., Any]:
    """From the flash-attn package; where it is missing, transformers loads the kernel of version 2 through `kernels`."""
    functions, _ = lazy_import_flash_attention(flash_version() or "flash_attention_2")
    return functions[1]


def varlen(
    q_SHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """PyTorch's own variable-length attention; a window of (-1, 0) is how it is told to be causal."""
    cumulative_M = cumulative(tuple(lengths), device=q_SHD.device)
    longest = max(lengths)
    out_SHD = varlen_attn(
        q_SHD,
        k_SKD,
        v_SKD,
        cumulative_M,
        cumulative_M,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q_SHD.shape[1] != k_SKD.shape[1],
    )
    assert isinstance(out_SHD, torch.Tensor)
    return out_SHD


@lru_cache(maxsize=64)  # the layers ask for the same, and a copy to the GPU waits for it
def cumulative(lengths: tuple[int, ...], *, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a training may ask next
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def flex(
    q_SHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """FlexAttention: all segments in one call, with a mask by blocks of tokens."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHD, k_SKD, v_SKD))
    out = compiled_flex()(
        q,
        k,
        v,
        block_mask=block_mask(lengths, device=q_SHD.device),
        scale=scaling,
        enable_gqa=q_SHD.shape[1] != k_SKD.shape[1],
    )
    return out[0].transpose(0, 1)


@lru_cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """Uncompiled it would hold all scores."""
    return torch.compile(flex_attention, dynamic=False)


def block_mask(lengths: list[int], *, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries needs: from the start of its first token's segment up to itself.

    Written down directly; `create_block_mask` would hold S x S entries on the way.
    """
    starts = torch.tensor([0, *itertools.accumulate(lengths[:-1])], device=device)
    start_S = starts.repeat_interleave(torch.tensor(lengths, device=device))
    total = len(start_S)
    block_N = torch.arange(-(-total // FLEX_BLOCK), device=device)
    first_N = start_S[block_N * FLEX_BLOCK]
    last_N = start_S[((block_N + 1) * FLEX_BLOCK - 1).clamp(max=total - 1)]
    # Blocks [whole_N, itself) lie in the segment of all the queries, so they need no mask; [needed_N, whole_N) and itself do.
    needed_N = first_N // FLEX_BLOCK
    whole_N = torch.minimum((last_N + FLEX_BLOCK - 1) // FLEX_BLOCK, block_N)
    part_N = whole_N - needed_N + 1
    index_NN = needed_N[:, None] + block_N
    index_NN = torch.where(block_N == part_N[:, None] - 1, block_N[:, None], index_NN)
    whole_index_NN = whole_N[:, None] + block_N
    limit = len(block_N) - 1

    def same_segment(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (q >= kv) & (start_S[q] == start_S[kv])

    return BlockMask.from_kv_blocks(
        part_N.int()[None, None],
        index_NN.clamp(max=limit).int()[None, None],
        (block_N - whole_N).int()[None, None],
        whole_index_NN.clamp(max=limit).int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=same_segment,
        seq_lengths=(total, total),
    )


KERNELS: dict[Backend, Attend] = {"sdpa": sdpa, "flash": flash, "varlen": varlen, "flex": flex}
