"""Several pairs in one block, none cut: each attends to itself alone, and only answers are learnt.

Pairs are put where they fit best, the longest first. `position_ids` start anew with each, which S2-Attn and full attention
both take as a border (longlora/attention/shifted.py); what is left of a block is a document of its own without a target.

Letters: L tokens of a block.
"""

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import ConcatDataset, Dataset, Subset

from longlora.data.shares import misfits
from longlora.data.text_blocks import IGNORED, TextBlocks, drawn
from longlora.data.tokens import documents
from longlora.section import refuse

Sample = dict[str, torch.Tensor]


class Pair(NamedTuple):
    """A dialogue as arrays of shape (L,)."""

    tokens: np.ndarray
    answer: np.ndarray
    """Whether a token is an answer's, its end mark included."""


def write(pairs: Iterable[Pair], file: Path, *, vocabulary: int) -> None:
    """Pairs end to end, as tokens.py writes documents: `tokens`, `offsets`, and `answers`, 1 where a token is learnt."""
    kind = np.uint16 if vocabulary <= 2**16 else np.int32
    rows = list(pairs)
    offsets = np.concatenate([[0], np.cumsum([len(p.tokens) for p in rows])]).astype(np.int64)
    tokens = np.concatenate([np.empty(0, kind), *(p.tokens.astype(kind) for p in rows)])
    answers = np.concatenate([np.empty(0, np.uint8), *(p.answer.astype(np.uint8) for p in rows)])
    save_file({"tokens": tokens, "answers": answers, "offsets": offsets}, file)


def read(file: Path) -> list[Pair]:
    """The pairs of a file, as views of the mapped file."""
    with safe_open(file, framework="pt") as tensors:
        tokens, answers, offsets = (tensors.get_tensor(n).numpy() for n in ("tokens", "answers", "offsets"))
    return [Pair(tokens[a:b], answers[a:b].astype(bool)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def pack(lengths: list[int], *, room: int) -> list[list[int]]:
    """Numbers of `lengths` by block, each block of at most `room` together: best fit, decreasing.

    Raises:
        ValueError: one is longer than `room`.
    """
    if lengths and max(lengths) > room:
        raise ValueError(f"a pair has {max(lengths)} tokens, a block {room}: prepare the pairs anew")
    blocks: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and number of each block, ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at == len(free):
            blocks.append([i])
            bisect.insort(free, (room - lengths[i], len(blocks) - 1))
        else:
            left, number = free.pop(at)
            blocks[number].append(i)
            bisect.insort(free, (left - lengths[i], number))
    return blocks


def block(pairs: list[Pair], *, length: int) -> Sample:
    """One training sample of `length` tokens."""
    tokens_L = np.zeros(length, dtype=np.int64)
    labels_L = np.full(length, IGNORED, dtype=np.int64)
    positions_L = np.empty(length, dtype=np.int64)
    start = 0
    for pair in pairs:
        size = len(pair.tokens)
        inside = slice(start, start + size)
        tokens_L[inside] = pair.tokens
        labels_L[inside] = np.where(pair.answer, tokens_L[inside], IGNORED)
        labels_L[start] = IGNORED  # what stands before it is another pair's
        positions_L[inside] = np.arange(size)
        start += size
    positions_L[start:] = np.arange(length - start)
    arrays = {"input_ids": tokens_L, "labels": labels_L, "position_ids": positions_L}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PairBlocks(Dataset[Sample]):
    """Exactly `samples` blocks of packed pairs, each once before any comes again, in an order drawn from the seed."""

    def __init__(self, file: Path, *, length: int, samples: int, seed: int) -> None:
        self.length = length
        self.pairs = read(file)
        self.blocks = pack([len(p.tokens) for p in self.pairs], room=length)
        self.plan = drawn(len(self.blocks), samples, np.random.default_rng(seed))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Sample:
        return block([self.pairs[i] for i in self.blocks[self.plan[index]]], length=self.length)


def training_blocks(
    tokens: Path, pairs: Path | None, *, length: int, samples: int, pairs_share: float, recall_share: float, seed: int
) -> Dataset[Sample]:
    """`samples` blocks, of which `pairs_share` are packed pairs and `recall_share` recall exercises; the rest is running text.

    Which comes when is drawn once from the seed. Without pairs, the blocks are those of `TextBlocks`.

    Raises:
        ValueError: the shares are more than all, or something that is to be trained on is not there.
    """
    learnt = pairs / "train.safetensors" if pairs is not None and pairs_share else None
    refuse(
        misfits(
            pairs_share=pairs_share,
            recall_share=recall_share,
            pairs=learnt is not None and bool(read(learnt)),
            exercises=bool(documents(tokens / "recall.safetensors")),
        )
    )
    count = round(samples * pairs_share)
    texts = samples - count
    if not count:
        if pairs is not None and (file := pairs / "train.safetensors").exists() and read(file):
            print("the pairs are not trained on: fit.pairs_share is 0", flush=True)
        return TextBlocks(tokens, length=length, samples=samples, recall_share=recall_share, seed=seed)
    assert learnt is not None
    packed = PairBlocks(learnt, length=length, samples=count, seed=seed)
    if not texts:
        return packed
    running = TextBlocks(
        tokens, length=length, samples=texts, recall_share=min(1.0, recall_share * samples / texts), seed=seed
    )
    is_pair = np.random.default_rng(seed).permutation(np.arange(samples) < count)
    order = np.where(is_pair, texts + np.cumsum(is_pair) - 1, np.cumsum(~is_pair) - 1)
    return Subset(ConcatDataset([running, packed]), order.tolist())
