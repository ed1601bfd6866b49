"""Which documents are evaluated on, and never trained on: some of the training source's, or another source's."""

import os
from pathlib import Path
from typing import ClassVar, Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from longlora.data.flat import flat_documents
from longlora.data.texts import Texts, read, refuse_empty
from longlora.data.tokenise import tokenise
from longlora.section import Section, nearest


class OtherTexts(Texts):
    """Documents of a source of their own."""

    place: ClassVar[str] = "blocks.held_out.texts"
    source: Literal["package", "text", "jsonl", "parquet", "hub", "bin"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen
    """As in `blocks`, and bin: a flat file of uint16 tokens, as LongLoRA's authors publish PG19 and proof-pile."""


class HeldOut(Section):
    """Documents that are never trained on."""

    names: list[str]
    """By name: the file's stem (its path below the folder, without the suffix, where several share a stem), or the row number.
    A number stands in quotes."""
    share: float = Field(ge=0, lt=1)
    """If none is named: this share of all documents, drawn from the seed."""
    texts: OtherTexts | None
    """Documents of another source to evaluate on; then all of the training source is trained on."""


def split(names: list[str], *, held_out: HeldOut, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and held-out; where other texts are evaluated on, all rows are for training.

    Raises:
        ValueError: a held-out name is not there, or one side would be empty.
    """
    if held_out.texts:
        return list(range(len(names))), []
    if held_out.names:
        # A file system may write ö as o and two dots (macOS does), and who names the file types one letter.
        known = [normalize("NFC", name) for name in names]
        wanted = {normalize("NFC", name) for name in held_out.names}
        if unknown := sorted(wanted - set(known)):
            close = nearest(unknown[0], known) if len(unknown) == 1 else ""
            hint = close if close.startswith("; did you mean") else f"; there are {len(known)}, e.g. {known[0]}"
            raise ValueError(f"blocks.held_out.names: no document named {', '.join(unknown)}{hint}")
        apart = [i for i, name in enumerate(known) if name in wanted]
    else:
        order = np.random.default_rng(seed).permutation(len(names))
        apart = sorted(order[: round(held_out.share * len(names))].tolist())
    rest = sorted(set(range(len(names))) - set(apart))
    if not rest or not apart:
        raise ValueError(
            f"blocks.held_out leaves {len(rest)} documents to train on and {len(apart)} to evaluate; both need one"
        )
    return rest, apart


def elsewhere(texts: OtherTexts, *, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """The tokens of documents that come from a source of their own, by name.

    Raises:
        ValueError: as `read`, or `flat_documents`; a text is empty.
    """
    if texts.source == "bin":
        return flat_documents(Path(os.path.expanduser(texts.name)), tokenizer=tokenizer)
    rows = read(texts)
    refuse_empty(rows, key="blocks.held_out.texts")
    tokens = tokenise(rows["text"], tokenizer=tokenizer)
    return {f"{texts.name}: {name}": t for name, t in zip(rows["name"], tokens, strict=True)}
