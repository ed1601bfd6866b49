"""How a run's model compares with the champion, by the metrics that dvc.yaml names for it
(`artifacts: NAME: meta: better: [{metric, order}, {metric, order, no_worse_than}]`).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from tasks import beside, registry, runs
from tasks.declared import Artifact, declared
from tasks.workspace import Project

ROUNDING = 1e-9
"""Two keys of forty are 0.05, whichever way the shares were rounded."""


@dataclass(frozen=True)
class Better:
    """One of `meta.better` of the model in dvc.yaml: a metric that a champion must win by, or must not lose by."""

    metric: str
    """As MLflow knows it: names joined by '/'."""
    order: Literal["lower", "higher"]
    no_worse_than: float | None = None
    """How much worse it may be, in the metric's own unit; None where it must be better."""
    step: int | None = None
    """The length, for a metric over lengths; None for the longest that both runs have."""
    data: str | None = None
    """The output that both must have been measured on, hash by hash."""
    params: str | list[str] = ""
    """The section or sections of params.yaml that both must have been measured by: other places of the same texts are other
    numbers, and so are those of another precision."""

    @property
    def sections(self) -> list[str]:
        return self.params.split() if isinstance(self.params, str) else self.params

    def of(self, label: str, *, instead: str) -> str:
        """The metric of the model `label`, where ours is that of `instead`."""
        return "/".join(label if part == instead else part for part in self.metric.split("/"))

    def holds(self, ours: float, theirs: float) -> bool:
        loss = ours - theirs if self.order == "lower" else theirs - ours
        return loss < 0 if self.no_worse_than is None else loss <= self.no_worse_than + ROUNDING

    def needed(self, theirs: str) -> str:
        """What ours must be, beside `theirs`."""
        if self.no_worse_than is None:
            return f"{self.order} than {theirs}"
        return f"at most {self.no_worse_than:g} {'above' if self.order == 'lower' else 'below'} {theirs}"


def comparisons_of(model: Artifact) -> list[Better]:
    """`meta.better` of dvc.yaml: a list, or a single one."""
    entries = model.meta.get("better", [])
    at = f"artifacts: {model.name}: meta: better"
    return [declared(Better, entry, at=at) for entry in (entries if isinstance(entries, list) else [entries])]


def better_of(model: Artifact) -> Better | None:
    """The first comparison: what tables show, and a schedule watches."""
    return next(iter(comparisons_of(model)), None)


def measured_beside(
    client: MlflowClient, where: Project, run: Run, champion: ModelVersion, better: Better
) -> Better | None:
    """The champion's metric as `run` measured it beside its own model, for where MLflow's scores of the champion do not
    compare: its own run measured in another way, or was resumed on other data since. None where they do compare, or
    `run` has no such metric."""
    other, source = client.get_run(str(champion.run_id)), str(champion.source)
    if not runs.moved(champion, other) and not differing(client, where, run.info.run_id, other.info.run_id, better):
        return None
    if not registry.rev_of(source):  # registered by hand
        source, _ = runs.source_and_model(where, other)
    label = beside.label_of(where, run, other, source)
    if label is None:
        return None
    model = runs.source_and_model(where, run)[1]
    return replace(better, metric=better.of(label, instead=Path(model.path).name))


def shortfall(
    client: MlflowClient,
    where: Project,
    ours: str,
    theirs: str,
    version: str,
    better: Better,
    *,
    there: Better | None = None,
) -> list[str]:
    """Why the run `ours` is not better than `theirs`, that of champion `version`, or too much worse.

    Args:
        there: the champion's metric in `ours`, if it was measured beside.
    """
    if not there and (what := differing(client, where, ours, theirs, better)):
        return [
            f"better: {what} is not what champion version {version} was measured on, so they cannot be compared; "
            "`longlora run --beside champion` measures both"
        ]
    mine, other = values_of(client, ours, better), values_of(client, ours if there else theirs, there or better)
    if not mine or not other:
        return [
            f"better: {better.metric} is missing in {f'the run of champion version {version}' if mine else 'this run'}"
        ]
    both = sorted(mine.keys() & other.keys())
    if not both:
        lengths = f"{', '.join(map(str, mine))}, and the champion's {', '.join(map(str, other))}"
        return [f"better: {better.metric} of this run is at {lengths}: nothing to compare"]
    a, b = mine[both[-1]], other[both[-1]]
    if better.holds(a, b):
        return []
    at = f" at {both[-1]}" if both[-1] else ""
    needed = better.needed(f"{b:.6g} of champion version {version}")
    return [f"better: {better.metric}{at} is {a:.6g}, and must be {needed}"]


def values_of(client: MlflowClient, run_id: str, better: Better) -> dict[int, float]:
    """The metric by step (length), shortest first, the newest value of each; only `better.step` if it names one."""
    points = {point.step: point.value for point in client.get_metric_history(run_id, better.metric)}
    return {step: points[step] for step in sorted(points) if better.step in (None, step)}


def differing(client: MlflowClient, where: Project, ours: str, theirs: str, better: Better) -> str:
    """What differs between the two measurements: the path of the data, or the first parameter; '' if nothing does."""
    one, other = (client.get_run(run_id) for run_id in (ours, theirs))
    if better.data:
        found, wanted = (runs.digests_of(where, run).get(better.data) for run in (one, other))
        if found != wanted:
            return better.data
    found, wanted = (settings_of(run, better) for run in (one, other))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            return f"{name} = {found.get(name)}"
    return ""


def settings_of(run: Run, better: Better) -> dict[str, str]:
    """The parameters that say how `run` was measured by `better`."""
    ours = tuple(f"{section}." for section in better.sections)
    return {name: value for name, value in run.data.params.items() if f"{name}.".startswith(ours)}
