"""Documents -> tokens to train on, tokens to evaluate on, and recall exercises.

The split is by document, so no held-out sentence is ever a neighbour of a training sentence.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from longlora.data.heldout import HeldOut, split
from longlora.data.recall import Recall
from longlora.data.texts import Texts, refuse_empty
from longlora.data.tokenise import tokenise
from longlora.data.tokens import write
from longlora.data.twins import refuse_twins
from longlora.section import Seed, write_json

if TYPE_CHECKING:
    from datasets import Dataset


class Blocks(Texts):
    license: str
    """Of the texts; carried into the model card."""
    held_out: HeldOut
    """Which documents are evaluated on."""
    seed: Seed
    recall: Recall
    """Exercises that are written beside the texts (longlora/data/recall.py)."""


def prepare(
    blocks: Blocks,
    *,
    tokenizer: PreTrainedTokenizerFast,
    exercises: Iterator[list[int]],
    texts: "Dataset",
    elsewhere: dict[str, np.ndarray] | None,
    out: Path,
    heldout: Path,
) -> dict[str, Any]:
    """Write training and recall tokens below `out`, the held-out ones to `heldout`; return the counts. Documents `elsewhere`, by
    name, are held out in place of some of `texts`.

    They are apart, so that other training data leave the evaluation as it is.

    Raises:
        ValueError: as `split`; a document is empty; a held-out document is a training document as well.
    """
    refuse_empty(texts, key="blocks")
    names = list(texts["name"])
    train, apart = split(names, held_out=blocks.held_out, seed=blocks.seed)
    trained = list(tokenise((texts[i]["text"] for i in train), tokenizer=tokenizer))
    own = tokenise((texts[i]["text"] for i in apart), tokenizer=tokenizer)
    held_out = elsewhere or dict(zip((names[i] for i in apart), own, strict=True))
    refuse_twins(trained, held_out, marks=[tokenizer.bos_token_id, tokenizer.eos_token_id])
    out.mkdir(parents=True)
    heldout.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = len(tokenizer)
    write(trained, out / "train.safetensors", vocabulary=vocabulary)
    write(held_out.values(), heldout, vocabulary=vocabulary)
    write((np.asarray(e) for e in exercises), out / "recall.safetensors", vocabulary=vocabulary)
    lengths = {"train": [len(t) for t in trained], "heldout": [len(t) for t in held_out.values()]}
    provenance = {
        "source": blocks.source,
        "name": blocks.name,
        "license": blocks.license,
        "held_out_of": blocks.held_out.texts.name if blocks.held_out.texts else blocks.name,
        "held_out": list(held_out),
        "passkey_words": blocks.recall.passkey and blocks.recall.count > 0,
    }
    write_json(provenance, out / "provenance.json")
    return {part: {"documents": len(n), "tokens": sum(n), "longest": max(n)} for part, n in lengths.items()}
