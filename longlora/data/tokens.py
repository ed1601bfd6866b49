"""Texts to tokens, once, and tokenised documents in a file.

Text is tokenised outside the training job (a distributed job that tokenises runs into the collective time-out), into
safetensors files that every rank maps into memory and shares.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast


def tokenise(texts: Iterable[str], *, tokenizer: PreTrainedTokenizerFast, together: int = 32) -> Iterator[np.ndarray]:
    """Each text's tokens between the model's begin and end marks, where it has them.

    Some texts `together`: the fast tokenizers spread them over all cores by themselves. Asked directly, they do not compute
    offsets and masks that nobody reads.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # What a tokenizer.json says of its training is no part of a document's tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, together)):
        for encoded in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*before, *encoded.ids, *after])


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
