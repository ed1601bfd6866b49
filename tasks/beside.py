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

from tasks import runs
from tasks.declared import Artifact
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
    run = runs.chosen(client, where, wanted)
    runs.must_be_ours(run)
    label = wanted if wanted in (CHAMPION, CANDIDATE) else label_by_key(run)
    entry = {**model_of(where, run), "path": label}
    return Addition(
        overrides=(f"{place.list}=[{label}]",),
        files={place.file(label): yaml.safe_dump({"outs": [entry]}, sort_keys=False)},
    )


def label_by_key(run: Run) -> str:
    """A key may be all digits, which YAML and metrics would take for a number."""
    return f"run-{run.data.tags[KEY]}"


def model_of(where: Project, run: Run) -> dict[str, Any]:
    """What the dvc.lock of `run` says of its model: hash, size, number of files."""
    _, model = runs.source_and_model(where, run)
    return runs.outputs_of(where, run)[model.path]


def label_of(where: Project, run: Run, other: Run) -> str | None:
    """Under which label `run` measured the model of run `other`, the very weights; None if it did not."""
    _, model = runs.source_and_model(where, run)
    place = beside_of(model)
    if place is None:
        return None
    wanted = model_of(where, other)["md5"]
    for label in (CHAMPION, CANDIDATE, label_by_key(other)):
        try:
            text = read(where.root, run.data.tags[RECORD], place.file(label))
        except ValueError:
            continue
        if yaml.safe_load(text)["outs"][0]["md5"] == wanted:
            return label
    return None


def beside_of(model: Artifact) -> Beside | None:
    return Beside(**model.meta["beside"]) if "beside" in model.meta else None
