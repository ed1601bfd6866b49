"""MLflow: one run per run key, filled from what DVC says.

Parameters are params.yaml, metrics and curves are the files that dvc.yaml calls so, inputs are outputs with their hashes. Run ids
are passed by hand: MLFLOW_RUN_ID in a child's environment would mark the run finished when the child ends.
A curve is followed while its stage runs, and replayed where the stage was cached; points that MLflow has are not sent again.
A score whose value has changed is sent again, and the newest counts.
"""

import json
import logging
import math
import os
import platform
import re
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote, unquote, urlsplit

import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from tasks.entities import curve, dataset, flat, measured, now, pictures
from tasks.locks import if_free
from tasks.machine import gpu_names
from tasks.servers import is_local_tracking, is_served, must_be_reachable
from tasks.stages import Out
from tasks.storage import without_credentials
from tasks.tags import DATA, DIRTY, HEAD, HOME, KEY, OVERRIDES, RECIPE, RECORD, REF, SNAPSHOT, SWEEPS, VERDICT
from tasks.workspace import Project, Snapshot, home, person

BATCH = 1000  # metrics in one request: MLflow's own limit
EVERY = 10  # seconds between two looks at the machine
MACHINE = "system/"  # MLflow's own name for what it sees there
NO_NAME = re.compile(r"[^\w. /-]")  # what MLflow refuses in a tag's name
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "flash-attn", "datasets", "dvc", "mlflow", "prefect",
)  # fmt: skip


def connect() -> MlflowClient:
    """A client of MLFLOW_TRACKING_URI (and MLFLOW_REGISTRY_URI, if that is another).

    Raises:
        ValueError: nobody answers there.
    """
    must_be_reachable("MLFLOW_TRACKING_URI")
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"], os.environ.get("MLFLOW_REGISTRY_URI"))


def experiment_id(client: MlflowClient, where: Project, name: str) -> str:
    """The id of experiment `name`, made if need be; its files go to our state folder, if no server has another place.

    Raises:
        ValueError: it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise ValueError(
            f"MLflow's experiment '{name}' was deleted: bring it back with `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, and MLFLOW_TRACKING_URI={without_credentials(os.environ['MLFLOW_TRACKING_URI'])}"
        )
    if found:
        if is_local_tracking(where):
            follow_move(where, found)
        return found.experiment_id
    # without a location they would go to ./mlruns, and a checkout with new files is another run
    served = is_served(os.environ["MLFLOW_TRACKING_URI"])
    location = None if served else (where.state / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was first
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return found.experiment_id


def follow_move(where: Project, experiment: Experiment) -> None:
    """Have the project's own database name its own folder for files of runs, if the project was moved, or copied with its runs:
    MLflow keeps whole paths, would make the old folder anew, and has no call that changes them."""
    old, new = str(experiment.artifact_location), (where.state / "mlartifacts").as_uri()
    state = Path(unquote(urlsplit(old).path)).parent
    # a clone that was told of our database, and keeps its files at home
    another = (state.parent / ".git").exists() and not (state / "mlflow.db").exists()
    if not (old.startswith("file:") and old.endswith("/mlartifacts")) or old == new or another:
        return
    with closing(sqlite3.connect(where.state / "mlflow.db", timeout=60)) as base, base:
        base.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment.experiment_id)
        )
        base.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
            (new, len(old) + 1, len(old) + 1, f"{old}/"),
        )


def find(client: MlflowClient, where: Project, experiment: str, key: str) -> Run | None:
    """The run with this key that is this project's to go on with: the oldest that began here, else the oldest of elsewhere that is
    not under way."""
    here = home(where)
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", order_by=["attributes.start_time ASC"])
    own = [run for run in found if run.data.tags.get(HOME) == here]
    return next(iter([*own, *(run for run in found if run.info.status != "RUNNING")]), None)


def begun(client: MlflowClient, experiment: str, tags: dict[str, str], *, name: str) -> Run:
    """A new run. Where the answer is lost, MLflow's client asks again and a twin is made, of the same moment: that is deleted."""
    run = client.create_run(experiment, tags=tags, run_name=name)
    moment = f"tags.`{KEY}` = '{tags[KEY]}' and attributes.start_time = {run.info.start_time}"
    for each in client.search_runs([experiment], moment):
        if each.info.run_id != run.info.run_id and each.data.tags.get(HOME) == tags[HOME]:
            client.delete_run(each.info.run_id)
    return run


def is_finished(client: MlflowClient, run_id: str, *, record: str) -> bool:
    """Whether there is a run of this id that ended well, with the tags by which `record` is found; one that was deleted is none."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    told = run.data.tags.get(RECORD) == record and {KEY, REF, VERDICT} <= run.data.tags.keys()
    return told and run.info.lifecycle_stage == "active" and run.info.status == "FINISHED"


def mark_dead_runs(client: MlflowClient, where: Project, experiment: str, *, but: str = "") -> None:
    """Say KILLED of runs that began in this project and whose process is gone, except run `but`."""
    here = home(where)  # compared here: in MLflow's filter an apostrophe of a folder's name would end the text
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        tags = run.data.tags
        if tags.get(HOME) == here and tags[KEY] != but:
            with if_free(where, tags[KEY]) as dead:
                # asked again: it may have ended well since it was found, and freed its lock then
                if dead and client.get_run(run.info.run_id).info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")


def join_sweep(client: MlflowClient, run: Run, name: str) -> None:
    """Tag `run` as one of sweep `name`."""
    known = run.data.tags.get(SWEEPS, "").split()
    client.set_tag(run.info.run_id, SWEEPS, " ".join(sorted({*known, name})))


class Tracker:
    """The MLflow run of one run key."""

    def __init__(
        self, client: MlflowClient, where: Project, snapshot: Snapshot, *, experiment: str, folder: Path
    ) -> None:
        self.client, self.folder = client, folder
        found = experiment_id(client, where, experiment)
        mark_dead_runs(client, where, found, but=snapshot.key)
        known = find(client, where, found, snapshot.key)
        tags = {**origin(where, snapshot), **environment()}
        run = known or begun(client, found, tags, name=called(snapshot))
        self.run_id: str = run.info.run_id
        self._sent: dict[str, dict[int, float]] = {}
        self._resumed = known is not None
        self._machine: SystemMetricsMonitor | None = None
        if known:
            client.update_run(self.run_id, status="RUNNING")
            self.tag(tags)
        params = [Param(key, value) for key, value in flat(yaml.safe_load((folder / "params.yaml").read_text()))]
        for start in range(0, len(params), 100):
            client.log_batch(self.run_id, params=params[start : start + 100])

    def watch(self) -> None:
        """Draw what the machine does as curves until the run ends: processors, memory, disk, network; GPUs with nvidia-ml-py."""
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # it tells each start and end on stderr
        self._machine = SystemMetricsMonitor(
            self.run_id, sampling_interval=EVERY, resume_logging=True, tracking_uri=self.client.tracking_uri
        )
        self._machine.start()

    def follow(self, outs: list[Out], points: Sequence[tuple[str, float, int]] = ()) -> None:
        """Send the points of `outs`' curves that are new, and those of `points` (name, value, step)."""
        self._send(metric for out in outs if out.kind == "plot" for metric in curve(self.folder, out))
        self._send(Metric(name, value, now(), step) for name, value, step in points)

    def stage(self, name: str, outs: list[Out]) -> None:
        """All that a finished stage has to show: curves, metrics, pictures, the hashes of its data."""
        self.follow(outs)
        for out in outs:
            path = self.folder / out.path
            if out.kind == "metric":
                numbers, words = measured(json.loads(path.read_text()))
                self._send(iter(numbers), again=True)
                self.tag(dict(words))
                self.client.log_artifact(self.run_id, str(path), str(Path(out.path).parent))
            elif out.kind == "plot":
                self.client.log_artifact(self.run_id, str(path), str(Path(out.path).parent))
            else:
                for picture in pictures(path):
                    target = picture.relative_to(self.folder).parent
                    self.client.log_artifact(self.run_id, str(picture), str(target))
        data = [out for out in outs if out.kind == "out" and out.md5]
        if data:
            self.client.log_inputs(self.run_id, datasets=[dataset(name, out) for out in data])
            self.tag({DATA + NO_NAME.sub("_", out.path): str(out.md5) for out in data})

    def describe(self, text: str, picture: str) -> None:
        """Set the run's description (Markdown), and below it the artifact at path `picture`, if that is not ''."""
        if picture:  # an address of MLflow's page, relative to it: wherever the page is, it has the file
            address = f"get-artifact?path={quote(picture)}&run_uuid={self.run_id}"
            text += f"\n\n![{Path(picture).stem}]({address})\n\n[{picture}]({address})\n"
        self.client.set_tag(self.run_id, "mlflow.note.content", text)

    def tag(self, tags: dict[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: str) -> None:
        """End the run, with what it ran from and what it made."""
        if self._machine:
            self._machine.finish()
        try:
            for name in ("params.yaml", "dvc.lock"):
                if (self.folder / name).exists():
                    self.client.log_artifact(self.run_id, str(self.folder / name))
        finally:  # where these cannot be written, the disk is full
            self.client.set_terminated(self.run_id, status)

    def _send(self, metrics: Iterator[Metric], *, again: bool = False) -> None:
        """Send what MLflow has not; `again`: also what it has with another value, for data outside of git may have changed."""
        fresh = [metric for metric in metrics if self._is_new(metric, again)]
        for start in range(0, len(fresh), BATCH):
            self.client.log_batch(self.run_id, metrics=fresh[start : start + BATCH])
        for metric in fresh:
            self._sent[metric.key][metric.step] = metric.value

    def _is_new(self, metric: Metric, again: bool) -> bool:
        if metric.key not in self._sent:
            history = self.client.get_metric_history(self.run_id, metric.key) if self._resumed else []
            self._sent[metric.key] = {point.step: point.value for point in history}  # the oldest first
        sent = self._sent[metric.key]
        return metric.step not in sent or (again and as_kept(sent[metric.step]) != as_kept(metric.value))


def as_kept(value: float) -> str:
    """`value` as MLflow's databases keep it, infinity as the largest number, to be compared: NaN is equal to NaN."""
    largest = sys.float_info.max
    return repr(value if math.isnan(value) else min(max(value, -largest), largest))


def called(snapshot: Snapshot) -> str:
    """What MLflow's pages call a run: its recipe, its key and what was set, for their list shows no tags."""
    return shorten(
        " ".join([f"{snapshot.recipe or 'params'}-{snapshot.key[:6]}", *snapshot.overrides]), 80, placeholder=" ..."
    )


def origin(where: Project, snapshot: Snapshot) -> dict[str, str]:
    """Tags that say what was run."""
    return {
        KEY: snapshot.key,
        HOME: home(where),
        RECIPE: snapshot.recipe or "",
        OVERRIDES: " ".join(snapshot.overrides),
        DIRTY: str(snapshot.dirty).lower(),
        SNAPSHOT: snapshot.commit,
        "mlflow.source.name": where.root.name,
        HEAD: snapshot.head,
        "mlflow.source.git.branch": snapshot.branch,
        "mlflow.user": person(where),
    }


def environment() -> dict[str, str]:
    """Tags that say where it ran."""
    tags = {"env.python": platform.python_version(), "env.platform": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            tags[f"env.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    memory = psutil.virtual_memory().total / 2**30
    return tags | {
        "hardware.cpus": str(os.cpu_count()),
        "hardware.memory": f"{memory:.0f} GiB",
        "hardware.gpus": gpu_names(),
    }
