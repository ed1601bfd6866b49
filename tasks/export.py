"""A recorded model as a plain folder: its files checked by hash, its card with pictures beside them, whole or not there at all."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from tasks import runs
from tasks.artifacts import DvcArtifactRepository
from tasks.declared import artifacts_in
from tasks.hashes import hash_of
from tasks.workspace import Project

CARDS = ("README.md", "summary.md")  # in the report, the first that is there


def export(client: MlflowClient, where: Project, target: Path, *, model: str) -> str:
    """Write `model` (an alias of the registry, or a run) to folder `target`. Returns what was done.

    Raises:
        ValueError: `target` is not a new or empty folder, or is the current one; there is no such model, or its data is
            missing or damaged.
    """
    if target.is_file():
        raise ValueError(
            f"{target} is a file: a model is exported to a new or empty folder, or with --gguf to a new file"
        )
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: a model is exported to a new or empty folder")
    said, target = target, target.resolve()  # a link to a folder stays one
    if target == Path.cwd():
        raise ValueError(f"{said} is the current folder, which cannot be replaced: name a folder in it")
    source, key = runs.address_and_key(client, where, model)
    repository = DvcArtifactRepository(source)
    with runs.data_of(model):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            made = assemble(repository, scratch)
            made.chmod(0o755)  # mkdtemp's is for the owner alone
            os.replace(made, target)  # over an empty folder, in one step
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    run = f"run {key}" if key else f"record {repository.rev[:12]}"
    return f"{model} ({run}) is in {said}: {size / 1e6:,.1f} MB, equal to its record by hash"


def assemble(repository: DvcArtifactRepository, scratch: Path) -> Path:
    """The model's folder inside `scratch`, complete and checked."""
    lock = yaml.safe_load(repository.files.read_text("dvc.lock"))
    hashes = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}
    made = bring(repository.files, repository.path.strip("/"), scratch / "model", hashes)
    report = next((each for each in artifacts_in(repository.files.repo) if each.type == "report"), None)
    if report:
        pages = bring(repository.files, report.path, scratch / "report", hashes)
        card = next((pages / name for name in CARDS if (pages / name).is_file()), None)
        if card:
            shutil.copy(card, made / "README.md")
            for picture in pages.glob("*.png"):
                if picture.name in card.read_text():
                    shutil.copy(picture, made)
    return made


def bring(files: Any, path: str, into: Path, hashes: dict[str, str]) -> Path:
    """Output `path` as folder `into`; its bytes must have the recorded hash."""
    if path not in hashes:
        raise ValueError(f"{path} is not an output of the run's dvc.lock")
    into.mkdir()
    for file in files.find(f"/{path}"):
        local = into / str(file).removeprefix(f"/{path}").lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(file, str(local))
    found = hash_of(into)
    if found != hashes[path]:
        raise ValueError(f"{path} is damaged: its hash is {found}, and must be {hashes[path]}")
    return into
