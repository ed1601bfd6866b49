"""Peak memory of a training step against the length: ours is linear, plain full attention with whole logits beside it.

Ours: S2-Attn, the loss in chunks, gradient checkpointing. Tiled: the feed-forward in tiles besides. Plain: transformers as it
comes. A tiny Llama in float32, one process per point, above what the process held with the model in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.fresh import rise_mb
from benchmarks.step import ADAPTER, CHUNK, SPARSE, small_llama, training
from benchmarks.turns import Cases, Sizes
from longlora.attention.shifted import enable
from longlora.model.adapter import attach
from longlora.training.loss import chunk_loss
from longlora.training.tile import tile_mlp

LAYERS, HIDDEN, HEADS, WORDS = 4, 128, 4, 8192
METHODS = ("ours", "tiled", "plain")
TILE = 1024


def alone(method: str, length: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For benchmarks.fresh."""
    model = small_llama(layers=LAYERS, hidden=HIDDEN, heads=HEADS, words=WORDS, dtype=torch.float32, length=int(length))
    attach(model, ADAPTER)
    if method != "plain":
        model.activation_checkpointing_enable({"use_reentrant": False})
        chunk_loss(model, chunk=CHUNK)
        enable(model, SPARSE)
    if method == "tiled":
        tile_mlp(model, tile=TILE)
    step = training(model, length=int(length))
    return partial(step, 64), partial(step, int(length))


def measure(length: int) -> dict[str, Any]:
    return {"length": length, "peak_mb": {method: rise_mb("memory", method, length) for method in METHODS}}


def cases(sizes: Sizes) -> Cases:
    return {str(n): partial(measure, n) for n in sizes.memory_lengths}


def line(rows: list[dict[str, Any]], method: str) -> tuple[float, float, float]:
    """(MB per 1,000 tokens, MB at no token, largest deviation from that line in MB) by least squares."""
    lengths = [row["length"] / 1000 for row in rows]
    peaks = [row["peak_mb"][method] for row in rows]
    mean_x, mean_y = sum(lengths) / len(rows), sum(peaks) / len(rows)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(lengths, peaks, strict=True)) / sum(
        (x - mean_x) ** 2 for x in lengths
    )
    start = mean_y - slope * mean_x
    return slope, start, max(abs(y - start - slope * x) for x, y in zip(lengths, peaks, strict=True))
