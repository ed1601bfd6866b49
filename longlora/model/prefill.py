"""Chunked prefill on a CPU: attend to the cache and to the new chunk separately, and merge the two by log-sum-exp.

PyTorch's kernel knows one causal form, a square. Elsewhere it takes a mask, which it reads for each head, and computes what the
mask leaves out. The cache needs no mask, and the new chunk is a square. Where transformers wants another mask, or the model
another attention, they are left as they are.

Letters: B rows; H query heads; K key/value heads; N new tokens, L cached and new; D head dimension.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
NAME = "WITHOUT_A_MASK"  # transformers reads more into a name that contains 'flash' or 'sdpa'


def unmask(model: PreTrainedModel) -> None:
    """Let `model`, which computes in transformers' full attention, compute it so."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)


def mask(**given: Any) -> torch.Tensor | None:
    """None where each new token sees all before it and itself, else transformers' own mask."""
    padding, end = given["attention_mask"], given["q_offset"] + given["q_length"]
    causal = given["mask_function"] is causal_mask_function and given["allow_is_causal_skip"]
    if causal and (padding is None or bool(padding.all())) and end == given["kv_length"] and given["kv_offset"] == 0:
        return None
    return sdpa_mask(**given)


def forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,  # transformers hands every attention function all it has
) -> tuple[torch.Tensor, None]:
    """out_BNHD, behind the signature that transformers calls."""
    new, cached = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and cached > 0 and new > 1:
        strange = any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "is_causal"))
        if not strange and not dropout and key.shape[-1] == value.shape[-1]:
            return in_two(query, key, value, scaling=scaling).transpose(1, 2), None
        attention_mask = torch.ones(new, cached + new, dtype=torch.bool, device=query.device).tril(cached)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)


def in_two(q_BHND: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, *, scaling: float | None) -> torch.Tensor:
    """out_BHND. A query's part in the whole is its sum of exponentials, given as its logarithm."""
    cached = k_BKLD.shape[2] - q_BHND.shape[2]
    old_BHND, old_BHN = kernel(q_BHND, k_BKLD[:, :, :cached], v_BKLD[:, :, :cached], 0.0, False, scale=scaling)
    new_BHND, new_BHN = kernel(q_BHND, k_BKLD[:, :, cached:], v_BKLD[:, :, cached:], 0.0, True, scale=scaling)
    return torch.lerp(old_BHND, new_BHND, torch.sigmoid(new_BHN - old_BHN)[..., None])
