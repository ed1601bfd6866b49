"""Documents as rows of a name and a text: from an installed package, a folder of text files, a table, or the hub."""

import importlib.util
import json
import os
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from longlora.section import Section

if TYPE_CHECKING:
    from datasets import Dataset

AT_ONCE = 1024
"""Texts that are put into a table together."""
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
    if texts.source in ("package", "text"):
        files = text_files(texts)
        return documents(map(text_of, files), names=names_of(files))
    if texts.source in ("jsonl", "parquet"):
        return documents(from_tables(texts), names=None)
    rows = from_hub(texts.name, split=texts.split)
    if texts.field not in rows.column_names:
        raise no_column(texts, place=texts.name, known=rows.column_names)

    def document(row: dict[str, Any], index: int) -> dict[str, str]:
        return {
            "name": str(index),
            "text": as_text(row[texts.field], place=f"row {index} of {texts.name}", texts=texts),
        }

    return rows.map(document, with_indices=True, remove_columns=rows.column_names)


def documents(texts: Iterable[str], *, names: list[str] | None) -> "Dataset":
    """Rows of `texts`, named by `names` or else by their numbers, held in memory once."""
    import pyarrow
    from datasets import Dataset  # a second, which those who read tokens alone need not spend

    left, kind = iter(texts), pyarrow.large_string()  # a plain string ends at 2 GiB
    pieces = iter(lambda: list(islice(left, AT_ONCE)), [])
    text = pyarrow.chunked_array([pyarrow.array(piece, kind) for piece in pieces], kind)
    return Dataset(pyarrow.table({"name": names or [str(number) for number in range(len(text))], "text": text}))


def as_text(value: Any, *, place: str, texts: Texts) -> str:
    """`value`, which is a text.

    Raises:
        ValueError: it is none, or holds a NUL, or half a character, as only an escape of JSON can.
    """
    if not isinstance(value, str):
        raise ValueError(f"{texts.place}.field: {place} has a {type(value).__name__} for '{texts.field}', not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{texts.place}.field: {place}: character {error.start} of '{texts.field}' is half of one, "
            f"\\u{ord(value[error.start]):04x}"
        ) from None
    if "\0" in value:
        raise ValueError(
            f"{texts.place}.field: {place}: character {value.index(chr(0))} of '{texts.field}' is a NUL, no text"
        )
    return value


def no_column(texts: Texts, *, place: str, known: list[str]) -> ValueError:
    return ValueError(
        f"{texts.place}.field: no column '{texts.field}' in {place}; there are {', '.join(known) or 'none'}"
    )


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
    from huggingface_hub import constants

    try:
        return load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"dataset '{name}': {str(error).splitlines()[0]}") from None
    except ConnectionError as error:
        kind = ValueError if constants.HF_HUB_OFFLINE else ConnectionError  # what is switched off stays so
        raise kind(f"dataset '{name}': {str(error).splitlines()[0]}") from None


def from_tables(texts: Texts) -> Iterator[str]:
    """The texts of JSONL or Parquet files, in order of their paths; of other columns nothing is asked.

    Raises:
        ValueError: there is no file, or no row in any; or as `lines_of`, `rows_of` and `as_text`.
    """
    key = f"{texts.place}.name"
    rows, row = (lines_of, "line") if texts.source == "jsonl" else (rows_of, "row")
    # by the whole path as text: rows are named by their number, which must not change
    files = sorted(matching(Path(os.path.expanduser(texts.name)), suffix=texts.source, key=key), key=str)
    held = False
    for file in files:
        for place, value in rows(file, texts=texts):
            held = True
            yield as_text(value, place=place, texts=texts)
    if not held:
        others = f" and {len(files) - 1} others" if len(files) > 1 else ""
        raise ValueError(f"{key}: {files[0]}{others}: no {row} in it")


def lines_of(file: Path, *, texts: Texts) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file has in the column, and where it stands; empty lines are skipped.

    Raises:
        ValueError: a line is not UTF-8 or no object of JSON, or lacks the column.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                text = line.decode().removeprefix("\ufeff")  # a mark at the beginning, as Windows writes it
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{texts.place}.name: {place}: byte {error.start + 1} of the line is not UTF-8"
                ) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text.rstrip())
            except (ValueError, RecursionError) as error:
                said = f"{error.msg} at column {error.colno}" if isinstance(error, JSONDecodeError) else str(error)
                raise ValueError(f"{texts.place}.name: {place} is no line of JSON: {said}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{texts.place}.name: {place} is a {type(row).__name__}; a line is an object, {{...}}")
            if texts.field not in row:
                raise no_column(texts, place=place, known=list(row))
            yield place, row[texts.field]


def rows_of(file: Path, *, texts: Texts) -> Iterator[tuple[str, Any]]:
    """What each row of a Parquet file has in the column, and which it is.

    Raises:
        ValueError: it cannot be read, or lacks the column.
    """
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        known = table.schema_arrow.names
        column = table.read(columns=[texts.field]).column(0) if texts.field in known else None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{texts.place}.name: {file} cannot be read as parquet: {str(error).splitlines()[0]}"
        ) from None
    if column is None:
        raise no_column(texts, place=str(file), known=known)
    yield from ((f"row {number} of {file}", value.as_py()) for number, value in enumerate(column))


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
            f"{file} is not text: character {text.index(chr(0))} is a NUL; it may be UTF-16, or no text at all; "
            f"a stray one goes by tr -d '\\0' < {shlex.quote(str(file))} > converted{file.suffix}"
        )
    return text


def text_files(texts: Texts) -> list[Path]:
    key = f"{texts.place}.name"
    if texts.source == "text":
        return matching(Path(os.path.expanduser(texts.name)), suffix="txt", other="md", key=key)
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
