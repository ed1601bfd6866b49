"""Tokenised documents in a file.

Text is tokenised once (longlora/data/tokenise.py), outside the training job (a distributed job that tokenises runs into the
collective time-out), into safetensors files that every rank maps into memory and shares.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


def write(documents: Iterable[np.ndarray], file: Path, *, vocabulary: int) -> None:
    """Documents end to end: `tokens` and `offsets` (document i is tokens[offsets[i]:offsets[i+1]])."""
    kind = np.uint16 if vocabulary <= 2**16 else np.int32
    arrays = [np.asarray(d, dtype=kind) for d in documents]
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    tokens = np.concatenate(arrays) if arrays else np.empty(0, kind)
    save_file({"tokens": tokens, "offsets": offsets}, file)


def documents(file: Path) -> list[np.ndarray]:
    """The documents of a tokens file, as views of the mapped file (through torch: safetensors' numpy reader copies)."""
    with safe_open(file, framework="pt") as tensors:
        tokens, offsets = tensors.get_tensor("tokens").numpy(), tensors.get_tensor("offsets").numpy()
    return [tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
