"""Recorded models that stand beside a run's own, such as the champion: measured by the same stages, on the same data.

dvc.yaml says where (`artifacts: NAME: meta: beside: {list: KEY, folder: FOLDER}`): the model's label goes into list KEY of
params.yaml, over which stages have a matrix, and the model into FOLDER, as a `.dvc` file that names it by hash. Both are part of
the run's snapshot, so weights are stored once, another champion is another run, and a clone with the same remote can repeat it.
"""

from dataclasses import dataclass
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from tasks import registry, runs, storage
from tasks.declared import Artifact, declared
from tasks.outputs import read
from tasks.tags import CANDIDATE, CHAMPION, KEY, RECORD
from tasks.workspace import Addition, Project


@dataclass(frozen=True)
class Beside:
    """`meta.beside` of the model in dvc.yaml."""

    list: str
    """A key of params.yaml, such as rivals.models."""
    folder: str
    """Relative to the project."""

    def file(self, label: str) -> str:
        return f"{self.folder}/{label}.dvc"


def addition(client: MlflowClient, where: Project, wanted: str) -> Addition:
    """What a snapshot needs so that model `wanted` (champion, candidate, or a run) is measured beside.

    Raises:
        ValueError: there is no such model, its record is gone, or dvc.yaml has no place for it.
    """
    model = runs.model_at(where)
    place = beside_of(model)
    if place is None:
        raise ValueError(
            f"--beside {wanted}: dvc.yaml does not say where, by artifacts: {model.name}: meta: beside: {{list: ..., folder: ...}}"
        )
    label, source = named(client, where, model, wanted)
    entry = {**model_of(where, source), "path": label}
    return Addition(
        appended={place.list: label},
        files={place.file(label): yaml.safe_dump({"outs": [entry]}, sort_keys=False)},
    )


def named(client: MlflowClient, where: Project, model: Artifact, wanted: str) -> tuple[str, str]:
    """The label of what `wanted` names, and the address of its model: a version's own, whatever its run has become."""
    alias = wanted in (CHAMPION, CANDIDATE)
    version = registry.holder(client, model.name, wanted) if alias else None
    if version and registry.rev_of(str(version.source)):
        return wanted, str(version.source)
    run = runs.chosen(client, where, wanted)
    return wanted if alias else label_by_key(run), runs.source_and_model(where, run)[0]


def label_by_key(run: Run) -> str:
    """A key may be all digits, which YAML and metrics would take for a number."""
    return f"run-{run.data.tags[KEY]}"


def model_of(where: Project, source: str) -> dict[str, Any]:
    """What the dvc.lock of the commit in address `source` says of the model there: hash, size, number of files."""
    record = registry.rev_of(source)
    storage.must_be_here(where, record, of=source)
    found = runs.outputs_at(where, record).get(registry.path_of(source))
    if not found:
        raise ValueError(f"{source} names no output of that commit's dvc.lock")
    return found


def label_of(where: Project, run: Run, other: Run, source: str) -> str | None:
    """Under which label `run` measured the model at address `source`, of run `other`: the very weights; None if it did not."""
    _, model = runs.source_and_model(where, run)
    place = beside_of(model)
    if place is None:
        return None
    wanted = model_of(where, source)["md5"]
    for label in (CHAMPION, CANDIDATE, label_by_key(other)):
        try:
            text = read(where.root, run.data.tags[RECORD], place.file(label))
        except ValueError:
            continue
        if yaml.safe_load(text)["outs"][0]["md5"] == wanted:
            return label
    return None


def beside_of(model: Artifact) -> Beside | None:
    if "beside" not in model.meta:
        return None
    return declared(Beside, model.meta["beside"], at=f"artifacts: {model.name}: meta: beside")
