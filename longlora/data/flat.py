"""Flat token files: little-endian uint16 token ids, end to end, without a header, as nanoGPT, landmark attention and LongLoRA's
authors write them (`np.memmap(file, dtype=np.uint16)`).

Such a file does not say whose tokens it holds, so what can be checked is checked: whole numbers, and ids that the tokenizer has.
Documents are cut where the tokenizer's begin or end mark stands; a file without marks is one document.
"""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast


def flat_documents(file: Path, *, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """The documents of a flat file by name (the file's stem and a number), as views of the mapped file.

    Raises:
        ValueError: no file, an empty one, half a token, or an id that the tokenizer does not have.
    """
    if not file.is_file():
        raise ValueError(f"no token file at {file} (seen from {Path.cwd()})")
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{file} has {size} bytes; a file of uint16 tokens has an even number of them, at least 2")
    tokens = np.memmap(file, dtype="<u2", mode="r")
    largest = int(tokens.max())
    if largest >= len(tokenizer):
        raise ValueError(
            f"{file} holds token {largest}, at place {int(tokens.argmax())}, and the tokenizer has {len(tokenizer)} "
            "(ids 0 and up): these are the tokens of another tokenizer"
        )
    edges = borders(tokens, begin=tokenizer.bos_token_id, end=tokenizer.eos_token_id)
    parts = [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return {f"{file.stem}-{number}": part for number, part in enumerate(parts)}


def borders(tokens: np.ndarray, *, begin: int | None, end: int | None) -> list[int]:
    """Where documents start, and where the last one ends: before each begin mark; without one, behind each end mark."""
    starts = np.flatnonzero(tokens == begin) if begin is not None else np.empty(0, np.int64)
    if not len(starts) and end is not None:
        starts = np.flatnonzero(tokens == end) + 1
    return sorted({0, *starts.tolist(), len(tokens)})
