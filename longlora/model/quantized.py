"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen linear layers in four bits while the adapter is trained.

bitsandbytes does it, on CUDA and on a CPU. NF4 has sixteen levels, the quantiles of a normal distribution, and a scale for every
64 weights, which are themselves in eight bits (double quantisation). What is trained whole, embeddings and norms,
stays as it was, and so does the output head. The merge is into the base as it is on the disk, in full precision.
"""

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from longlora.parallel.device import own_gpu


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is told, with the arithmetic in `dtype`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "adapter.quantized = nf4 needs bitsandbytes: pip install 'longlora-pipeline[qlora]', or set null"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def device_map() -> dict[str, int] | None:
    """Where a process has its quantised weights, which do not move afterwards: on its own GPU, if there is one."""
    return own_gpu() if torch.cuda.is_available() else None


def keep_for_training(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the weights anew at the first pass without gradients: on CPUs with 16 bit instructions it
    would, for inference, round their scales once more, and refuse layers whose width is no multiple of 64."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
