"""The loss in chunks against the plain one, forward and backward: time and peak memory. Hidden size 512, 32,000 words, float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from benchmarks.fresh import rise_mb
from benchmarks.turns import Cases, Sizes, take_turns
from longlora.training.loss import chunked_cross_entropy

HIDDEN, WORDS, CHUNK = 512, 32000, 1024
METHODS = ("chunked", "plain")


def prepared(method: str, length: int) -> Callable[[int], None]:
    generator = torch.Generator().manual_seed(0)
    hidden_BLD = torch.randn(1, length, HIDDEN, generator=generator).requires_grad_()
    weight_VD = torch.randn(WORDS, HIDDEN, generator=generator) * HIDDEN**-0.5
    labels_BL = torch.randint(WORDS, (1, length), generator=generator)

    def plain(tokens: int) -> torch.Tensor:
        logits_TV = linear(hidden_BLD[0, : tokens - 1], weight_VD).float()
        return cross_entropy(logits_TV, labels_BL[0, 1:tokens])

    def chunked(tokens: int) -> torch.Tensor:
        return chunked_cross_entropy(hidden_BLD[:, :tokens], weight_VD, labels_BL[:, :tokens], chunk=CHUNK)

    def once(tokens: int) -> None:
        torch.autograd.grad((chunked if method == "chunked" else plain)(tokens), hidden_BLD)

    return once


def alone(method: str, length: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For benchmarks.fresh."""
    once = prepared(method, int(length))
    return partial(once, 64), partial(once, int(length))


def measure(length: int, *, patience: float) -> dict[str, Any]:
    works = {method: partial(prepared(method, length), length) for method in METHODS}
    for work in works.values():
        work.func(64)
    result = take_turns(works, ours="chunked", patience=patience)
    for name, said in result.items():
        said["peak_mb"] = rise_mb("loss", name, length)
    return {"length": length, "methods": result}


def cases(sizes: Sizes) -> Cases:
    return {str(n): partial(measure, n, patience=sizes.patience) for n in sizes.loss_lengths}
