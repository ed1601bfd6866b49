"""Runs in MLflow: which one is meant, and its model."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc_data.index import DataIndexError
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks import registry, storage, tracking
from tasks.declared import Artifact
from tasks.errors import one_line
from tasks.outputs import artifacts_at
from tasks.tags import ALIASES, GIT, KEY, RECORD, REF, STAGING
from tasks.workspace import Project, git


@contextmanager
def data_of(model: str) -> Generator[None]:
    """For work on the data of `model`: whatever keeps it from being read becomes an error of one line.

    Raises:
        ValueError: MLflow, DVC or the disk says no.
    """
    try:
        yield
    except DataIndexError as error:  # of a folder; what it says itself names no cause
        cause = one_line(error.__cause__)
        raise ValueError(f"{model}: its data is neither in the cache nor on the DVC remote ({cause})") from None
    except (MlflowException, DvcException, OSError) as error:
        raise ValueError(f"{model}: {one_line(error)}") from None


def chosen(client: MlflowClient, where: Project, wanted: str | None) -> Run:
    """The run whose key or MLflow id begins with `wanted`, or that of an alias of the registry; without it, the last finished one.

    Raises:
        ValueError: there is none, or more than one.
    """
    if wanted in ALIASES:
        name = model_at(where).name
        version = registry.holder(client, name, wanted)
        if not version:
            raise ValueError(f"{none_yet(name, wanted)}, or name a run")
        return maker(client, version)
    runs = matching(client, where, wanted)
    if runs and len({run.data.tags.get(KEY, run.info.run_id) for run in runs}) == 1:  # clones may have one each
        return next((run for run in runs if run.info.status == "FINISHED"), runs[0])
    if not runs:
        raise ValueError(
            f"no run '{wanted}': `longlora runs` lists them" if wanted else "no finished run yet: `longlora run`"
        )
    raise ValueError(f"'{wanted}' could be {', '.join(r.data.tags.get(KEY, r.info.run_id) for r in runs[:5])}")


def none_yet(name: str, alias: str) -> str:
    """What to say where model `name` has no version with this alias: how it gets one. One is staging while a person is asked."""
    return f"{name} has no {alias} yet: `longlora promote{' --approval' if alias == STAGING else ''}`"


def maker(client: MlflowClient, version: ModelVersion) -> Run:
    """The run that made `version`, as it was then.

    Raises:
        ValueError: MLflow has it no longer, or with another record and its scores.
    """
    if not (made := registry.run_of(client, version)):
        raise ValueError(registry.runless(version))
    if other := moved(version, made):
        raise ValueError(other)
    return made


def moved(version: ModelVersion, made: Run) -> str:
    """What to say of `version` if `made`, which made it, was resumed on other data since; else ''. MLflow has one set of scores for
    a run, the newest."""
    registered, now = registry.rev_of(str(version.source)), made.data.tags.get(RECORD, "")
    if registered in ("", now):
        return ""
    if not now:
        return untagged(made)
    return (
        f"{version.name} version {version.version} is of record {registered[:12]}, and its run {made.data.tags.get(KEY)} was "
        f"resumed on other data since, so it has record {now[:12]} and that one's scores: `longlora run --beside` measures "
        "the version itself, and the run's key names the run as it is now"
    )


def matching(client: MlflowClient, where: Project, wanted: str | None) -> list[Run]:
    """The runs whose key or MLflow id begins with `wanted`; without it, the last finished one of ours: it has a key."""
    experiment = tracking.experiment_id(client, where, model_at(where).name)
    if wanted is None:
        ours = f"attributes.status = 'FINISHED' AND tags.`{KEY}` LIKE '%'"
        return list(client.search_runs([experiment], ours, order_by=["attributes.end_time DESC"], max_results=1))
    if not re.fullmatch("[0-9a-f]*", wanted):  # no key's beginning, and nothing for a filter
        return []
    found = {
        run.info.run_id: run
        for name in (f"tags.`{KEY}`", "attributes.run_id")
        for run in client.search_runs([experiment], f"{name} LIKE '{wanted}%'")
    }
    return sorted(found.values(), key=lambda run: run.info.end_time or 0, reverse=True)


def model_at(where: Project, rev: str | None = None) -> Artifact:
    """The model of dvc.yaml at commit `rev`; without it, in the checkout that was asked about, as it is: runs take its name there.

    Raises:
        ValueError: it names none.
    """
    models = [artifact for artifact in artifacts_at(where.tree, rev) if artifact.type == "model"]
    if not models:
        raise ValueError("dvc.yaml has no `artifacts:` of `type: model`, so there is no name to register a model under")
    return models[0]


def address_and_key(client: MlflowClient, where: Project, wanted: str) -> tuple[str, str]:
    """The dvc:// address of the model that `wanted` names, an alias of the registry or a run, and the run's key.

    Raises:
        ValueError: there is none, or more than one; the run is not finished.
    """
    name = model_at(where).name
    version = registry.holder(client, name, wanted)
    if version:
        return from_here(where, str(version.source)), version.tags.get(KEY, "")  # one made by hand has none
    if wanted in ALIASES:
        raise ValueError(f"{none_yet(name, wanted)}, or name a run with --model")
    run = chosen(client, where, wanted)
    return from_here(where, source_and_model(where, run)[0]), run.data.tags[KEY]


def from_here(where: Project, source: str) -> str:
    """`source`, to be read from this clone if that has its commit: where it was registered from may be elsewhere by now."""
    rev = registry.rev_of(source)
    return registry.placed(source, str(where.root)) if storage.at_hand(where, {rev}) else source


def source_and_model(where: Project, run: Run) -> tuple[str, Artifact]:
    """The address of `run`'s model, and what its own dvc.yaml says of it.

    Raises:
        ValueError: the run is not ours, or not finished.
    """
    tags = run.data.tags
    must_be_ours(run)
    if run.info.status != "FINISHED":
        raise ValueError(f"run {tags[KEY]} is {run.info.status.lower()}, and only of a finished one is there a model")
    if not {RECORD, REF} <= tags.keys():
        raise ValueError(untagged(run))
    record = tags[RECORD]
    storage.must_be_here(where, record, of=f"run {tags[KEY]}")
    model = model_at(where, record)
    repo, ref = tags.get(GIT) or str(where.root), tags[REF]
    return registry.source_of(model.name, path=model.path, rev=record, repo=repo, ref=ref), model


def untagged(run: Run) -> str:
    """What to say of a finished run whose record MLflow names no longer: a tag may be deleted on its page."""
    return f"run {run.data.tags.get(KEY)} has lost tags in MLflow by which its record is found: the same run again sets them"


def must_be_ours(run: Run) -> None:
    """Raises ValueError: `run` has no key; anyone may log runs of their own in the experiment."""
    if KEY not in run.data.tags:
        raise ValueError(f"run {run.info.run_id} was not made by `longlora run`, so there is no record of it")


def outputs_of(where: Project, run: Run) -> dict[str, dict[str, Any]]:
    """What the dvc.lock of `run` says of each output: hash, size, number of files.

    Raises:
        ValueError: the run is not finished, or its record is not reachable.
    """
    source, _ = source_and_model(where, run)
    return outputs_at(where, registry.rev_of(source))


def outputs_at(where: Project, record: str) -> dict[str, dict[str, Any]]:
    """The same of commit `record`, which this clone has."""
    lock = yaml.safe_load(git("show", f"{record}:dvc.lock", cwd=where.root))
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return {out["path"]: {key: value for key, value in out.items() if key != "path"} for out in outs}


def digests_of(where: Project, run: Run) -> dict[str, str]:
    """The hash of each output. Of a run that was resumed on other data MLflow has those of both, and the record says which holds.

    Raises:
        ValueError: as `outputs_of`, in that case.
    """
    found = [item.dataset for item in (run.inputs.dataset_inputs if run.inputs else [])]
    by_name = {data.name: data.digest for data in found}
    if len(by_name) == len(found):
        return by_name
    return {path: out["md5"] for path, out in outputs_of(where, run).items() if path in by_name}
