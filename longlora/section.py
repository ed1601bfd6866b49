"""A section of params.yaml as a typed, frozen value, and the one way a stage is called.

A stage is a function. Its `Path` arguments come from the command line in order, its `Section` arguments from params.yaml by
name; nothing else reads configuration. Stated once here, checked against dvc.yaml by tests/test_contract.py.
"""

import difflib
import gc
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


class Frozen(BaseModel):
    """A typed value that does not change; a key that it does not know is refused, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Section(Frozen):
    """A section of params.yaml. Every key is required, none may be unknown: params.yaml says all, and says it once."""


def each_once(values: list[Any]) -> list[Any]:
    """`values`, a section's list.

    Raises:
        ValueError: one stands in it twice, and would count twice.
    """
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands twice")
    return values


Once = AfterValidator(each_once)
Seed = Annotated[int, Field(ge=0, lt=2**32, description="All that is drawn by chance here is drawn from it.")]
S = TypeVar("S", bound=Section)


def read_params(path: Path) -> dict[str, Any]:
    """All of a params file as plain containers. OmegaConf reads `2e-5` as a number and refuses a key given twice."""
    params = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(params, dict):
        raise ValueError(f"{path} must hold sections (name: {{key: value}}), not a {type(params).__name__}")
    return {str(name): section for name, section in params.items()}


def section_of(kind: type[S], params: dict[str, Any], name: str) -> S:
    """The section `name` of `params`, typed.

    Raises:
        ValueError: a key is missing, unknown (the nearest known one is named) or outside its range; all of them in one line.
    """
    if name not in params:
        raise ValueError(f"params: section '{name}' is missing{nearest(name, list(params))}")
    try:
        return kind.model_validate(params[name])
    except ValidationError as error:
        raise ValueError("params: " + "; ".join(complaint(kind, name, e) for e in error.errors())) from None


def complaint(kind: type[Frozen], name: str, error: Any) -> str:
    """One pydantic error in words: which key, which rule, which value, and the nearest right name for an unknown key."""
    key = ".".join([name, *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        *inside, last = error["loc"]
        return f"unknown key '{key}'{nearest(str(last), list(section_at(kind, inside).model_fields))}"
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        said += "; put it in quotes"  # YAML reads 01 as 1, and no as false
    # A rule between keys is given the section as a whole, which says nothing to the reader.
    return f"{key}: {said}" if isinstance(error["input"], dict | Frozen) else f"{key} = {error['input']!r}: {said}"


def section_at(kind: type[BaseModel], inside: list[str | int]) -> type[BaseModel]:
    """The section in `kind` that the place `inside` leads to, through lists and optional ones."""
    for name in inside:
        if isinstance(name, str) and name in kind.model_fields:
            kind = next(iter(sections_in(kind.model_fields[name].annotation)), kind)
    return kind


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known)}"


def refuse(misfits: Iterable[str]) -> None:
    """Raises ValueError: all `misfits`, sentences on what does not fit together, in one line; nothing where there are none."""
    if said := "; ".join(misfits):
        raise ValueError(said)


def write_json(value: Any, file: Path) -> None:
    """`value` as JSON in `file`, whose folder is made; a number that is not finite is none of JSON's, and a ValueError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def first_line(error: BaseException) -> str:
    """What a foreign `error` says, in one line: its kind if it says nothing, or a key alone; of a heading, what it heads too."""
    said, kind = [line.strip() for line in str(error).splitlines() if line.strip()], type(error).__name__
    if not said or isinstance(error, KeyError):
        return ": ".join([kind, *said[:1]])
    return " ".join(said[: 2 if said[0].endswith(":") else 1])


def call(stage: Callable[..., None], paths: list[str], params: dict[str, Any]) -> None:
    """Call `stage` with its paths and its typed sections."""
    arguments = list(inspect.signature(stage, eval_str=True).parameters.values())
    wanted = [a.name for a in arguments if a.annotation is Path]
    if len(wanted) != len(paths):
        raise ValueError(f"{stage.__name__} takes {len(wanted)} paths ({', '.join(wanted)}), got {len(paths)}")
    given = iter(paths)
    stage(*[Path(next(given)) if a.annotation is Path else section_of(a.annotation, params, a.name) for a in arguments])


def run(stage: Callable[..., None]) -> None:
    """Entry point of every stage. A mistake of the user's ends in one line and status 2, a server that is away in one and status 1,
    for another try may reach it; a defect of ours ends in a traceback."""
    gc.freeze()  # what was imported stays: nothing looks through it for garbage again, at the interpreter's end a second long
    try:
        call(stage, sys.argv[1:], read_params(Path("params.yaml")))
    except (ValueError, OSError) as error:
        if not raised_here(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, ConnectionError) else 2) from None


def raised_here(error: BaseException) -> bool:
    """Whether this library raised `error` on purpose (rather than something below it, by surprise)."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parent)
