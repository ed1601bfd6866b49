"""What several commands take, and where they are."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from tasks.workspace import Project

Recipe = Annotated[
    str | None, typer.Option("--recipe", "-r", help="An overlay of params.yaml: a file of recipes/, by its name.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="key=value, such as fit.steps=200. May be repeated.")
]
Run = Annotated[
    str | None,
    typer.Argument(
        help="Its key or MLflow id, or their beginning; or champion, staging, candidate; default: the last finished."
    ),
]
Beside = Annotated[
    str | None, typer.Option(help="A model that is measured on the same data: champion, candidate, or a run.")
]
Promote = Annotated[
    bool, typer.Option("--promote", help="Promote the model afterwards, if the gate and the comparison allow it.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="A model's folder, champion, staging, candidate, or a run.")]
PromptName = Literal["chat", "authors", "plain"]  # these three are the library's, which takes seconds to import
TooLong = Literal["refuse", "truncate", "windows"]
Dtype = Literal["f32", "f16", "bf16"]
Prompt = Annotated[
    PromptName | None,
    typer.Option(
        help="chat: the tokenizer's template, the default if it has one; authors: LongLoRA's INST prompt, the default "
        "if not; plain: for a model that was trained only on texts, such as the demo's."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Run even if the training would not fit into this machine's memory.")
]


def must_hold_model(folder: Path) -> None:
    """Say that there is no model before it is imported what opens one. Raises ValueError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model at {folder} (no config.json there, seen from {Path.cwd()})")


def must_take(name: str, file: Path) -> None:
    """Check that `file` can be written, its folders made if need be: before the work whose result goes there.

    Raises:
        ValueError: it cannot; `name` is what the command line calls it.
    """
    if file.is_dir():
        raise ValueError(f"{name} {file}: is a folder, and must be a file")
    above = file if file.exists() else next(each for each in file.absolute().parents if each.exists())
    if above != file and not above.is_dir():
        raise ValueError(f"{name} {file}: {above} is a file, and must be a folder")
    # A file is written anew beside the old one, and takes its place.
    for place in (above, file.resolve().parent) if file.is_file() else (above,):
        if not os.access(place, os.W_OK):
            raise ValueError(f"{name} {file}: {place} cannot be written to")


def state_below(folder: Path, *, model: Path) -> Path:
    """Where a command on a `model`'s folder leaves files: the state folder of the project that `folder` is in, or one of its own,
    which is beside the model where it would lie in it: the model's seal says what files are there."""
    from tasks.workspace import project

    try:
        return project(folder).state
    except ValueError:  # such a command works from anywhere
        beside = model.parent if folder.resolve().is_relative_to(model) else folder
        return beside / ".longlora"


def here() -> "Project":
    """The project of the current folder, its servers' addresses in the environment."""
    from tasks import servers, workspace

    where = workspace.project(Path.cwd())
    servers.use_environment(where)
    return where
