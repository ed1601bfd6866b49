"""Test cases as JSON lines: what is malformed is named by file and line."""

import json
from codecs import BOM_UTF8
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Case(BaseModel):
    """What a case must have; what else a line holds is not looked at."""

    model_config = ConfigDict(frozen=True, strict=True)


C = TypeVar("C", bound=Case)


def read_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place `FILE:LINE`; empty lines are skipped.

    Raises:
        ValueError: there is no such file, it holds none, or a line is no UTF-8 or no JSON object.
    """
    if not file.is_file():
        kind = "is a folder: name a file in it" if file.is_dir() else f"is not there (seen from {Path.cwd()})"
        raise ValueError(f"no case file at {file}: it {kind}")
    rows = []
    # As bytes: a string of JSON may hold marks that Python, but not JSON lines, takes for the end of a line.
    for number, line in enumerate(file.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
        place = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = parsed(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: byte {error.start + 1} of the line is not UTF-8") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a case is an object, {{...}}, not a {type(row).__name__}")
        rows.append((place, row))
    if not rows:
        raise ValueError(f"{file}: no case in it")
    return rows


class TwiceError(ValueError):
    """An object that has a key twice: which of them is meant, nobody can tell."""

    def __init__(self, key: str) -> None:
        super().__init__(f"has {key!r} twice")
        self.key = key


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for its parser.

    Raises:
        TwiceError: it has a key twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        raise TwiceError(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
    return row


def parsed(line: str) -> Any:
    """What a line of JSON says.

    Raises:
        ValueError: it is no JSON, has a key twice, or is nested deeper than can be read.
    """
    try:
        return json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deep to be read") from None


def case(kind: type[C], row: dict[str, Any], *, place: str) -> C:
    """The case in `row`.

    Raises:
        ValueError: a key is missing or of the wrong type; all of them in one line, after `place`.
    """
    try:
        return kind.model_validate_json(json.dumps(row))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{place}: {wrong}") from None
