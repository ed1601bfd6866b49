"""Whether the champion has got worse on the data as it is now: what a schedule may ask before it trains anew.

The champion stands beside (tasks/beside.py), so it is measured by the stages that measure every model. Of the graph only those
are run, and a run that follows finds them done.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.run_dir import RunDir
from tasks import registry, runs, supervise, tracking
from tasks.comparison import Better, better_of, values_of
from tasks.entities import measured
from tasks.stages import Stage
from tasks.tags import CHAMPION


def still_good(run_dir: RunDir, *, by: float) -> str:
    """What to say if the champion is at most the share `by` worse than when it was promoted; '' if it is worse.

    Raises:
        ValueError: there is no champion, or no stage that measures it.
        StageError: a stage ended with an error.
    """
    client, model = tracking.connect(), runs.model_at(run_dir.where, run_dir.snapshot.commit)
    champion, better = registry.holder(client, model.name, CHAMPION), better_of(model)
    if not champion or not better:
        raise ValueError(f"{model.name} has no champion, or dvc.yaml no `meta.better`: nothing to be worse than")
    own = replace(better, metric=better.of(CHAMPION, instead=Path(model.path).name))
    try:
        file = measure(run_dir, needed(run_dir.stages, own.metric))
    except BaseException:
        supervise.stop_all()  # a stage still runs if this thread was interrupted
        raise
    before = values_of(client, runs.maker(client, champion).info.run_id, better)
    return comparison(points(file, own), before, better=own, by=by)


def needed(stages: list[Stage], metric: str) -> list[Stage]:
    """The stages up to the one whose metric file is METRIC.json, that one last.

    Raises:
        ValueError: there is none.
    """
    writes = [s for s in stages if any(o.kind == "metric" and f"/{o.path}".endswith(f"/{metric}.json") for o in s.outs)]
    if not writes:
        raise ValueError(f"no stage of dvc.yaml writes {metric}.json, so the champion cannot be watched")
    wanted = {writes[0].name}
    for stage in reversed(stages):  # upstream comes first
        if stage.name in wanted:
            wanted |= set(stage.upstream)
    return [stage for stage in stages if stage.name in wanted]


@task(task_run_name="measure the champion", cache_policy=NO_CACHE)
def measure(run_dir: RunDir, stages: list[Stage]) -> Path:
    """Bring these stages up to date; the last one's metric file."""
    log = get_run_logger()
    for stage in stages:
        run_dir.dvc.bring_up_to_date(stage.name, log=partial(log.info, "%s | %s", stage.name))
    (path,) = (out.path for out in stages[-1].outs if out.kind == "metric")
    return run_dir.folder / path


def points(file: Path, better: Better) -> dict[int, float]:
    """The metric by step, as MLflow would have it."""
    metrics, _ = measured(json.loads(file.read_text()))
    return {m.step: m.value for m in metrics if m.key == better.metric and better.step in (None, m.step)}


def comparison(now: dict[int, float], before: dict[int, float], *, better: Better, by: float) -> str:
    """As `still_good`, by the values of the metric by step.

    Raises:
        ValueError: they have no step in common.
    """
    both = sorted(now.keys() & before.keys())
    if not both:
        raise ValueError(
            f"{better.metric} is at {', '.join(map(str, now))} now, and was at {', '.join(map(str, before))}"
        )
    a, b = now[both[-1]], before[both[-1]]
    worse = a > b * (1 + by) if better.order == "lower" else a < b * (1 - by)
    said = f"{better.metric} at {both[-1]} is {a:.6g}, and was {b:.6g} when it was promoted"
    print(f"{said}: {'worse' if worse else 'not worse'} by {by:.1%}", flush=True)
    return "" if worse else said
