"""Windows of documents, and what a model makes of their tokens: nats, of the scored tokens together or of every token.

Logits are made for the tokens that are asked for, and no more of them at once than memory holds.

Letters: B windows of a batch, W windows, L tokens of a window, N scored tokens of a window, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache, PreTrainedModel

from longlora.model.cache import CHUNK, shareable
from longlora.model.load import batch_tokens, must_reach, spread
from longlora.parallel.sharding import ours, whole

BATCH_LOGITS = 2**26
"""Logits that are in memory at once, at most (one window may need more): 256 MB."""


@dataclass(frozen=True)
class Target:
    """The scored tokens [end - last, end) of a document."""

    document: int
    end: int


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a document, of which the last `scored` count."""

    document: int
    start: int
    end: int
    scored: int


def targets(
    lengths_of_documents: list[int],
    *,
    longest: int,
    last: int,
    samples: int,
    seed: int,
    setting: str,
    per_document: int | None = None,
) -> list[Target]:
    """Up to `samples` targets, of one document up to `per_document`, in the order of the text: a seeded choice among spans that
    never overlap. `setting` is where params.yaml says how long windows are.

    Raises:
        ValueError: no document is as long as the longest window.
    """
    grid = [
        Target(document, end)
        for document, length in enumerate(lengths_of_documents)
        for end in range(longest, length + 1, last)
    ]
    if not grid:
        raise ValueError(
            f"no held-out document has {longest} tokens, the longest window; the longest has "
            f"{max(lengths_of_documents, default=0)}: lower {setting}, or hold out longer documents"
        )
    chosen: list[int] = []
    taken = Counter[int]()
    for number in np.random.default_rng(seed).permutation(len(grid)).tolist():
        document = grid[number].document
        if len(chosen) < samples and (per_document is None or taken[document] < per_document):
            chosen.append(number)
            taken[document] += 1
    return [grid[number] for number in sorted(chosen)]


def nats(model: PreTrainedModel, *, documents: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """The summed negative log likelihood (nats) of the scored tokens of each window. Logits are made for those alone."""
    total_W = np.zeros(len(windows), dtype=np.float64)

    def work(batch: list[int]) -> None:
        loss_BN = losses(model, documents=documents, group=[windows[i] for i in batch])
        total_W[batch] = loss_BN.double().sum(dim=1).cpu().numpy()

    spread(work, our_batches(model, windows), model=model)
    return whole(total_W)


def last_nats(model: PreTrainedModel, *, documents: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """Nats (W, N) of each scored token of windows of one shape."""
    nats_WN = np.zeros((len(windows), windows[0].scored))

    def work(batch: list[int]) -> None:
        nats_WN[batch] = losses(model, documents=documents, group=[windows[i] for i in batch]).cpu().numpy()

    spread(work, our_batches(model, windows), model=model)
    return whole(nats_WN)


def losses(model: PreTrainedModel, *, documents: list[np.ndarray], group: list[Window]) -> torch.Tensor:
    """Nats (B, N) of the scored tokens of a batch of windows of one shape."""
    tokens_BL = torch.from_numpy(np.stack([documents[w.document][w.start : w.end].astype(np.int64) for w in group])).to(
        model.device
    )
    scored = group[0].scored
    # The last token is only predicted, never read.
    logits_BNV = model(input_ids=tokens_BL[:, :-1], use_cache=False, logits_to_keep=scored).logits.float()
    return F.cross_entropy(logits_BNV.transpose(1, 2), tokens_BL[:, -scored:], reduction="none")


def token_nats(model: PreTrainedModel, *, documents: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """Nats (W, L - 1) of every token but the first of windows of one length L, with all of its window before it.

    The window is read in pieces over a cache, so no more than a piece's logits are in memory. Where a cache does not serve
    longer texts, it is read at once, and logits are made of the hidden states in pieces.
    """
    length, vocabulary = windows[0].end - windows[0].start, model.config.get_text_config().vocab_size
    must_reach(model, length - 1)
    nats_WL = np.zeros((len(windows), length - 1), dtype=np.float32)
    size = max(1, batch_tokens(model) // length)
    shared = shareable(model)
    piece = max(1, min(CHUNK if shared else length, BATCH_LOGITS // (size * vocabulary)))

    def work(first: int) -> None:
        group = windows[first : first + size]
        tokens_BL = torch.from_numpy(
            np.stack([documents[w.document][w.start : w.end].astype(np.int64) for w in group])
        ).to(model.device)
        cache, headed = (
            (DynamicCache(config=model.config), None) if shared else (None, head_of(model, tokens_BL[:, :-1]))
        )
        for start in range(0, length - 1, piece):
            end = min(start + piece, length - 1)
            if headed:
                kept = torch.arange(start, end)  # from there it indexes hidden states on whatever GPU
                out = headed(input_ids=tokens_BL[:, :-1], use_cache=False, logits_to_keep=kept)
            else:
                out = model(input_ids=tokens_BL[:, start:end], past_key_values=cache, use_cache=True)
            # Several GPUs: without accelerate's hook on the whole model the logits stay on the last one.
            next_BN = tokens_BL[:, start + 1 : end + 1].to(out.logits.device)
            loss_BN = F.cross_entropy(out.logits.float().transpose(1, 2), next_BN, reduction="none")
            nats_WL[first : first + size, start:end] = loss_BN.cpu().numpy()

    spread(work, (n for n in range(0, len(windows), size) if ours(n // size)), model=model)
    return whole(nats_WL)


def head_of(model: PreTrainedModel, tokens_BL: torch.Tensor) -> PreTrainedModel:
    """`model`, or the one that peft has wrapped in it, after its layers have read the tokens: given the same once more, it makes
    logits alone, in its family's own way. It shares its modules with `model`, which is left as it is. Where a family's layers are
    not found apart, it is the model itself, which reads again."""
    # by peft's name for it: importing peft would cost each measure more than a second
    inner = getattr(model, "get_base_model", lambda: model)()
    assert isinstance(inner, PreTrainedModel)
    if inner.base_model is inner:
        return inner
    read = inner.base_model(input_ids=tokens_BL, use_cache=False)
    layers, head = copy(inner.base_model), copy(inner)
    layers.forward = lambda *_, **__: read
    vars(head).pop("forward", None)  # accelerate binds it to `model` itself, where that lies on several devices
    vars(head)["_modules"] = dict(inner.named_children()) | {inner.base_model_prefix: layers}  # a copy would share it
    return head


def our_batches(model: PreTrainedModel, windows: list[Window]) -> Iterator[list[int]]:
    """This process's share of the batches."""
    must_reach(model, max((w.end - w.start for w in windows), default=1) - 1)
    vocabulary = model.config.get_text_config().vocab_size
    every = enumerate(batches(windows, tokens=batch_tokens(model), vocabulary=vocabulary))
    return (batch for number, batch in every if ours(number))


def batches(windows: list[Window], *, tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Numbers of windows of one shape, in order, as many at a time as `tokens` and the logits allow, at least one."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(windows):
        shapes.setdefault((window.end - window.start, window.scored), []).append(number)
    for (length, scored), numbers in shapes.items():
        size = max(1, min(tokens // length, BATCH_LOGITS // (scored * vocabulary)))
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))
