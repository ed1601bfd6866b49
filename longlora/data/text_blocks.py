"""Running text and recall exercises as training blocks of L tokens that remember where each document starts.

Letters: L tokens of a block.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from longlora.data.tokens import documents

IGNORED = -100
"""A label that does not count."""


class TextBlocks(Dataset[dict[str, torch.Tensor]]):
    """Exactly `samples` training blocks of L tokens, in the order they are trained on.

    The training documents, in a seeded order, end to end, are cut every L tokens; recall exercises are blocks of their own.
    Which block comes when is drawn once from the seed: resuming is a matter of skipping, and the number of ranks changes
    nothing. `position_ids` start anew with each document, which is how transformers marks packed sequences; the first token
    of a document is no target, so that no loss crosses a border.
    """

    def __init__(self, folder: Path, *, length: int, samples: int, recall_share: float, seed: int) -> None:
        generator = np.random.default_rng(seed)
        texts = documents(folder / "train.safetensors")
        self.length = length
        self.exercises = documents(folder / "recall.safetensors")
        self.texts = [texts[i] for i in generator.permutation(len(texts))]
        self.starts = np.concatenate([[0], np.cumsum([len(t) for t in self.texts])])
        count = int(self.starts[-1]) // length
        if count == 0:
            raise ValueError(f"the training documents hold {self.starts[-1]} tokens, a block needs {length}")
        recalls = round(samples * recall_share)
        kinds = generator.permutation(np.arange(samples) < recalls)
        self.plan = np.empty(samples, dtype=np.int64)
        self.plan[~kinds] = drawn(count, samples - recalls, generator)
        self.plan[kinds] = -1 - drawn(len(self.exercises), recalls, generator) if recalls else 0

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        which = int(self.plan[index])
        if which < 0:
            tokens_L = self.exercises[-1 - which].astype(np.int64)
            if len(tokens_L) != self.length:
                raise ValueError(
                    f"a recall exercise has {len(tokens_L)} tokens, a block {self.length}: prepare the data anew"
                )
            return block(tokens_L, borders=[0])
        first, last = which * self.length, (which + 1) * self.length
        a, b = np.searchsorted(self.starts, [first, last - 1], side="right") - 1
        inside = [self.texts[i] for i in range(a, b + 1)]
        tokens_L = np.concatenate(inside)[first - self.starts[a] :][: self.length].astype(np.int64)
        return block(tokens_L, borders=[0, *(self.starts[a + 1 : b + 1] - first)])


def drawn(count: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """`samples` of `count` things, each once before any comes again."""
    rounds = -(-samples // count) if samples else 0
    return (
        np.concatenate([generator.permutation(count) for _ in range(rounds)])[:samples]
        if rounds
        else np.empty(0, np.int64)
    )


def block(tokens_L: np.ndarray, *, borders: list[int]) -> dict[str, torch.Tensor]:
    """One training sample; `borders` are the places where a document starts (0 first, also in the middle of one)."""
    positions_L = np.arange(len(tokens_L))
    labels_L = tokens_L.copy()
    for border in borders[1:]:
        positions_L[border:] = np.arange(len(tokens_L) - border)
        labels_L[border] = IGNORED
    arrays = {"input_ids": tokens_L, "labels": labels_L, "position_ids": positions_L}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
