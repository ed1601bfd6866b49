"""A Llama computed from its GGUF file alone, in float64, by ggml's definitions; nothing of transformers or of the converter.

Rotation: ggml's `ggml_rope_ext` in its "normal" mode turns the neighbours (2i, 2i+1) of a head by
position x base^(-2i/D), divided by rope_freqs[i] where there is such a tensor, or by rope_factors_short[i] where the context that
the file is opened with is at most the original one, else by rope_factors_long[i]; then scaled: linear multiplies the angle by
1/factor; YaRN mixes both angles on a ramp between two corrected dimensions, and lengthens cosine and sine by
1 + 0.1 ln(factor). `rope.scaling.attn_factor` multiplies them whatever the scaling.

Letters: T tokens, H heads, D dimensions of one, F = D/2.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata by name, and tensors in float64."""
    reader = GGUFReader(file)
    told = {name: field.contents() for name, field in reader.fields.items()}
    return told, {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}


def turns(
    told: dict[str, Any], tensors: dict[str, np.ndarray], *, length: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, each (T, F)."""
    size, base = told["llama.rope.dimension_count"], told["llama.rope.freq_base"]
    scaling, factor = told.get("llama.rope.scaling.type", "linear"), told.get("llama.rope.scaling.factor", 1.0)
    window = told.get("llama.rope.scaling.original_context_length", told["llama.context_length"])
    index = np.arange(size // 2)
    lists = (
        f"rope_factors_{'long' if context > window else 'short'}.weight"
        if scaling == "longrope"
        else "rope_freqs.weight"
    )
    whole = base ** (-2.0 * index / size) / tensors.get(lists, np.ones(size // 2))
    angle, longer = whole / factor, told.get("llama.rope.scaling.attn_factor", 1.0)
    if scaling == "yarn":
        fast, slow = (size * math.log(window / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32.0, 1.0))
        low, high = max(0, math.floor(fast)), min(size - 1, math.ceil(slow))
        kept = 1 - np.clip((index - low) / max(0.001, high - low), 0, 1)
        angle, longer = angle * (1 - kept) + whole * kept, longer * (1 + 0.1 * math.log(factor))
    angles = np.arange(length)[:, None] * angle
    return np.cos(angles) * longer, np.sin(angles) * longer


def logits(file: Path, tokens: list[int], *, context: int | None = None) -> np.ndarray:
    """(T, vocabulary). `context`: what the file is opened with, by default all that it says."""
    told, tensors = read(file)
    heads, shared = told["llama.attention.head_count"], told["llama.attention.head_count_kv"]
    cosine, sine = turns(told, tensors, length=len(tokens), context=context or told["llama.context_length"])
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        least = told["llama.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + least) * tensors[name]

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def rotate(x_THD: np.ndarray) -> np.ndarray:
        even, odd = x_THD[..., 0::2], x_THD[..., 1::2]
        c, s = cosine[:, None], sine[:, None]
        return np.stack([even * c - odd * s, even * s + odd * c], axis=-1).reshape(x_THD.shape)

    x = tensors["token_embd.weight"][tokens]
    for block in range(told["llama.block_count"]):
        at = f"blk.{block}."
        y = norm(x, f"{at}attn_norm.weight")
        q, k, v = (
            project(y, f"{at}attn_{name}").reshape(len(tokens), -1, told["llama.attention.key_length"])
            for name in "qkv"
        )
        q, k, v = rotate(q), np.repeat(rotate(k), heads // shared, axis=1), np.repeat(v, heads // shared, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1]) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + project(np.einsum("hts,shd->thd", weights, v).reshape(len(tokens), -1), f"{at}attn_output")
        y = norm(x, f"{at}ffn_norm.weight")
        gate = project(y, f"{at}ffn_gate")
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, f"{at}ffn_up"), f"{at}ffn_down")
    x = norm(x, "output_norm.weight")
    return x @ tensors.get("output.weight", tensors["token_embd.weight"]).T
