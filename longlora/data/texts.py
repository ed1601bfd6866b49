"""Documents as rows of a name and a text: from an installed package, a folder of text files, a table, or the hub."""

import glob
import importlib.util
import os
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from longlora.section import Section

if TYPE_CHECKING:
    from datasets import Dataset

ELSEWHERE = "a run sees only what git tracks, so give an absolute path"
"""What is said where data are not found at a relative path."""


class Texts(Section):
    """Where documents come from."""

    place: ClassVar[str] = "blocks"
    """Where in params.yaml that is said, for messages."""
    source: Literal["package", "text", "jsonl", "parquet", "hub"]
    """package: text files of an installed Python package; text: a folder of .txt files (without any, .md); jsonl, parquet: file or
    folder; hub: a `datasets` hub id."""
    name: str
    """The package, file, folder or hub id."""
    split: str | None
    """hub: which split; null is train."""
    field: str
    """jsonl, parquet, hub: the column that holds the text."""


def read(texts: Texts) -> "Dataset":
    """The documents, as rows of `name` and `text`, in a fixed order. (A bin source has no text: flat.py reads it.)

    Raises:
        ValueError: nothing is found or can be read, a column is missing (the columns there are, are named), or a row has no text.
    """
    from datasets import Dataset  # a second, which those who read tokens alone need not spend

    if texts.source in ("package", "text"):
        files = text_files(texts)
        return Dataset.from_dict({"name": names_of(files), "text": [text_of(f) for f in files]})
    rows = from_hub(texts.name, split=texts.split) if texts.source == "hub" else from_table(texts)
    if texts.field not in rows.column_names:
        raise ValueError(
            f"{texts.place}.field: no column '{texts.field}' in {texts.name}; there are {', '.join(rows.column_names)}"
        )

    def document(row: dict[str, Any], index: int) -> dict[str, str]:
        text = row[texts.field]
        if not isinstance(text, str):
            raise ValueError(
                f"{texts.place}.field: row {index} of {texts.name} has a {type(text).__name__} for '{texts.field}', not a text"
            )
        return {"name": str(index), "text": text}

    return rows.map(document, with_indices=True, remove_columns=rows.column_names)


def refuse_empty(rows: "Dataset", *, key: str) -> None:
    """Raise ValueError where a document holds no text; `key` is where params.yaml names their source."""
    empty = [name for name, text in zip(rows["name"], rows["text"], strict=True) if not text.strip()]
    if empty:
        raise ValueError(f"{key}: {len(empty)} of {len(rows)} documents are empty, {empty[0]} first")


def from_hub(name: str, *, split: str | None) -> "Dataset":
    """A dataset of the hub; `split` None takes 'train'.

    Raises:
        ValueError: there is none of this name, no such split, or it is not open to whoever asks.
        ConnectionError: the hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"dataset '{name}': {str(error).splitlines()[0]}") from None
    except ConnectionError as error:
        raise ConnectionError(f"dataset '{name}': {str(error).splitlines()[0]}") from None


def from_table(texts: Texts) -> "Dataset":
    """The rows of JSONL or Parquet files.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    place = Path(texts.name).expanduser()
    files = [str(f) for f in matching(place, suffix=texts.source, key=f"{texts.place}.name")]
    if texts.source == "jsonl":
        must_hold_lines(files, key=f"{texts.place}.name")
    kind = "json" if texts.source == "jsonl" else "parquet"
    try:
        # What it takes are patterns: a[1].jsonl would be a1.jsonl.
        return load_dataset(kind, data_files=[glob.escape(f) for f in files], split="train")
    except (DatasetGenerationError, ArrowInvalid) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{texts.place}.name: {texts.name} cannot be read as {texts.source}: {reason}") from None


def must_hold_lines(files: list[str], *, key: str) -> None:
    """Raise ValueError where a line is not UTF-8, or no file holds any: `datasets` would say neither so that it is understood."""
    held = False
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                held = held or bool(line.strip())
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{key}: {file}:{number}: byte {error.start + 1} of the line is not UTF-8"
                    ) from None
    if not held:
        others = f" and {len(files) - 1} others" if len(files) > 1 else ""
        raise ValueError(f"{key}: {files[0]}{others}: no line in it")


def text_of(file: Path) -> str:
    try:
        # A mark at the beginning, as Windows writes it, is no text.
        text = file.read_text("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "latin1"
        converted = f"iconv -f {encoding} -t utf-8 {shlex.quote(str(file))} > converted{file.suffix}"
        raise ValueError(
            f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; convert it, as by {converted}"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{file} is not text: character {text.index(chr(0))} is a NUL; it may be UTF-16, or no text at all"
        )
    return text


def text_files(texts: Texts) -> list[Path]:
    key = f"{texts.place}.name"
    if texts.source == "text":
        return matching(Path(texts.name).expanduser(), suffix="txt", other="md", key=key)
    try:
        spec = importlib.util.find_spec(texts.name)
    except (ImportError, ValueError):  # there is no package of what stands before its dot, or it is no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{key}: package '{texts.name}' is not installed; pip install {texts.name}")
    return matching(Path(next(iter(spec.submodule_search_locations))), suffix="txt", other="md", key=key)


def names_of(files: list[Path]) -> list[str]:
    """Each file's stem; where several share it, the path below the folder that holds all files, with its suffix if need be. No two
    are equal. A byte that is no UTF-8, which no table takes, is written out."""
    above = os.path.commonpath([f.parent for f in files])
    stems, paths = Counter(f.stem for f in files), Counter(f.with_suffix("") for f in files)
    below = [
        f.relative_to(above) if paths[f.with_suffix("")] > 1 else f.relative_to(above).with_suffix("") for f in files
    ]
    names = [f.stem if stems[f.stem] == 1 else name.as_posix() for f, name in zip(files, below, strict=True)]
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]


def matching(place: Path, *, suffix: str, key: str, other: str | None = None) -> list[Path]:
    """`place` itself, or all files `below` it with the suffix; without any, with the `other`.

    Raises:
        ValueError: there is none.
    """
    files = [place] if place.is_file() else below(place, suffix=suffix)
    if not files and other:
        files = below(place, suffix=other)
    if not files:
        hint = "" if place.is_absolute() else f"; {ELSEWHERE}"
        raise ValueError(f"{key}: no .{suffix} file at {place} (seen from {Path.cwd()}){hint}")
    return files


def below(place: Path, *, suffix: str) -> list[Path]:
    """All files below the folder `place` with the suffix, in whatever case, sorted by path, but none that is hidden."""
    found = sorted(f for f in place.rglob("*") if f.suffix.lower() == f".{suffix}" and f.is_file())
    return [f for f in found if not any(part.startswith(".") for part in f.relative_to(place).parts)]
