"""Documents -> tokens -> full-length blocks that remember which document each token is from.

Text is tokenised once, outside the training job (a distributed job that tokenises runs into the collective time-out), into
safetensors files that every rank maps into memory and shares. The split into training and held-out is by document, so no
held-out sentence is ever a neighbour of a training sentence.

Letters: L tokens of a block.
"""

import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerFast

from longlora.section import Section, Seed

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # a label that does not count
RUN = 50
"""Tokens of a run that no two documents share by chance (Lee et al. 2022, "Deduplicating Training Data", take as many)."""
BASE = 0x9E3779B97F4A7C15
"""Of the hashes of runs: odd, so that it has an inverse; 2 ** 64 over the golden ratio."""
TWIN = 0.5
"""Of a held-out document's runs, the share that may not stand in training documents."""


class Recall(Section):
    reach: int = Field(gt=0)
    """Tokens between a fact and its question, at most. Beyond a group only the steps in full attention at the end see the fact."""
    count: int = Field(ge=0)
    """How many different exercises are written."""
    nearness: float = Field(gt=0)
    """A question comes at reach x u ** nearness, u uniform in [0, 1): at 2 half of them within a quarter of the reach, at 0.5
    half of them beyond 0.7 of it."""
    passkey: bool
    """Whether the pass-key prompt's own words are among the exercises; if so, passkey retrieval is no question in new words."""


class Texts(Section):
    """Where documents come from."""

    source: Literal["package", "text", "jsonl", "parquet", "hub", "bin"]
    """As in `blocks`, and bin: a flat file of uint16 tokens, as LongLoRA's authors publish PG19 and proof-pile."""
    name: str
    """The package, file, folder or hub id."""
    split: str | None
    """hub: which split; null is train."""
    field: str
    """jsonl, parquet, hub: the column that holds the text."""


class HeldOut(Section):
    """Documents that are never trained on."""

    names: list[str]
    """By name: the file's stem (its path below the folder, without the suffix, where several share a stem), or the row number."""
    share: float = Field(ge=0, lt=1)
    """If none is named: this share of all documents, drawn from the seed."""
    texts: Texts | None
    """Documents of another source to evaluate on; then all of the training source is trained on."""


class Blocks(Section):
    source: Literal["package", "text", "jsonl", "parquet", "hub"]
    """package: text files of an installed Python package; text: a folder of .txt files (without any, .md); jsonl, parquet: file or
    folder; hub: a `datasets` hub id."""
    name: str
    """The package, file, folder or hub id."""
    split: str | None
    """hub: which split; null is train."""
    field: str
    """jsonl, parquet, hub: the column that holds the text."""
    license: str
    """Of the texts; carried into the model card."""
    held_out: HeldOut
    """Which documents are evaluated on."""
    seed: Seed
    recall: Recall
    """Exercises that are written beside the texts (longlora/data/recall.py)."""


def read(blocks: Blocks | Texts) -> "Dataset":
    """The documents, as rows of `name` and `text`, in a fixed order. (A bin source has no text: `longlora.data.heldout` reads it.)

    Raises:
        ValueError: nothing is found or can be read, a column is missing (the columns there are, are named), or a row has no text.
    """
    from datasets import Dataset  # a second, which those who read tokens alone need not spend

    if blocks.source in ("package", "text"):
        files = text_files(blocks)
        return Dataset.from_dict({"name": names_of(files), "text": [text_of(f) for f in files]})
    rows = from_hub(blocks.name, split=blocks.split) if blocks.source == "hub" else from_table(blocks)
    if blocks.field not in rows.column_names:
        raise ValueError(
            f"blocks.field: no column '{blocks.field}' in {blocks.name}; there are {', '.join(rows.column_names)}"
        )

    def document(row: dict[str, Any], index: int) -> dict[str, str]:
        text = row[blocks.field]
        if not isinstance(text, str):
            raise ValueError(
                f"blocks.field: row {index} of {blocks.name} has a {type(text).__name__} for '{blocks.field}', not a text"
            )
        return {"name": str(index), "text": text}

    return rows.map(document, with_indices=True, remove_columns=rows.column_names)


def from_hub(name: str, *, split: str | None) -> "Dataset":
    """A dataset of the hub; `split` None takes 'train'.

    Raises:
        ValueError: there is none of this name, or it is not open to whoever asks.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, split=split or "train")
    except DatasetNotFoundError as error:
        raise ValueError(f"dataset '{name}': {str(error).splitlines()[0]}") from None


def from_table(blocks: Blocks | Texts) -> "Dataset":
    """The rows of JSONL or Parquet files."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    files = sorted(str(f) for f in matching(Path(blocks.name), suffix=blocks.source))
    kind = "json" if blocks.source == "jsonl" else "parquet"
    try:
        return load_dataset(kind, data_files=files, split="train")
    except (DatasetGenerationError, ArrowInvalid) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"blocks.name: {blocks.name} cannot be read as {blocks.source}: {reason}") from None


def text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None


def text_files(blocks: Blocks | Texts) -> list[Path]:
    if blocks.source == "text":
        return matching(Path(blocks.name), suffix="txt", other="md")
    spec = importlib.util.find_spec(blocks.name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"blocks.name: package '{blocks.name}' is not installed; pip install {blocks.name}")
    return matching(Path(next(iter(spec.submodule_search_locations))), suffix="txt", other="md")


def names_of(files: list[Path]) -> list[str]:
    """Each file's stem; where several share it, the path below the folder that holds all files. No two are equal."""
    shared = Counter(f.stem for f in files)
    above = os.path.commonpath([f.parent for f in files])
    return [f.stem if shared[f.stem] == 1 else f.relative_to(above).with_suffix("").as_posix() for f in files]


def matching(place: Path, *, suffix: str, other: str | None = None) -> list[Path]:
    """`place` itself, or all files below it with the suffix (without any: with the `other`), sorted by path."""
    files = sorted(place.rglob(f"*.{suffix}")) if place.is_dir() else [place] if place.is_file() else []
    if not files and other:
        files = sorted(place.rglob(f"*.{other}"))
    if not files:
        raise ValueError(f"blocks.name: no .{suffix} file at {place} (seen from {Path.cwd()})")
    return files


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


def split(names: list[str], *, held_out: HeldOut, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and held-out; where other texts are evaluated on, all rows are for training.

    Raises:
        ValueError: a held-out name is not there, or one side would be empty.
    """
    if held_out.texts:
        return list(range(len(names))), []
    if held_out.names:
        unknown = sorted(set(held_out.names) - set(names))
        if unknown:
            raise ValueError(
                f"blocks.held_out.names: no document named {', '.join(unknown)}; there are {len(names)}, e.g. {names[0]}"
            )
        apart = [i for i, name in enumerate(names) if name in set(held_out.names)]
    else:
        order = np.random.default_rng(seed).permutation(len(names))
        apart = sorted(order[: round(held_out.share * len(names))].tolist())
    rest = sorted(set(range(len(names))) - set(apart))
    if not rest or not apart:
        raise ValueError(
            f"blocks.held_out leaves {len(rest)} documents to train on and {len(apart)} to evaluate; both need one"
        )
    return rest, apart


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
        ValueError: as `split`; a held-out document is a training document as well.
    """
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
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return {part: {"documents": len(n), "tokens": sum(n), "longest": max(n)} for part, n in lengths.items()}


def refuse_twins(trained: list[np.ndarray], held_out: dict[str, np.ndarray], *, marks: list[int | None]) -> None:
    """Raise ValueError where half of a held-out document stands in training documents, word for word; `marks` are no words."""
    apart = {name: runs(tokens, marks=marks) for name, tokens in held_out.items()}
    known = np.unique(np.concatenate(list(apart.values())))
    seen = np.zeros(len(known), dtype=bool)
    for tokens in trained:
        found = runs(tokens, marks=marks)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        seen[at[known[at] == found]] = True
    shares = {name: seen[np.searchsorted(known, own)].mean() for name, own in apart.items()}
    twins = [name for name, share in shares.items() if share >= TWIN]
    if twins:
        raise ValueError(
            f"{len(twins)} of {len(held_out)} held-out documents are also trained on, word for word, {twins[0]} first "
            f"({shares[twins[0]]:.0%} of it): leave them out of one side"
        )


def runs(tokens: np.ndarray, *, marks: list[int | None]) -> np.ndarray:
    """A hash (64 bits) of every run of `RUN` tokens, `marks` left out; of all of them where there are fewer."""
    bare = np.asarray(tokens)[~np.isin(tokens, [mark for mark in marks if mark is not None])].astype(np.uint64)
    length = min(RUN, len(bare))
    # A polynomial in an odd number, modulo 2 ** 64: sums of the terms so far, taken from each other, and divided by the power.
    sums = np.cumsum((bare + np.uint64(1)) * powers(BASE, len(bare)))
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    return (sums[length:] - sums[: len(sums) - length]) * powers(pow(BASE, -1, 2**64), len(sums) - length)


def powers(base: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, base, dtype=np.uint64))


class PackedBlocks(TorchDataset[dict[str, torch.Tensor]]):
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
        if recall_share > 0 and not self.exercises:
            raise ValueError(f"fit.recall_share = {recall_share} needs exercises, and blocks.recall.count is 0")
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
