"""Runs over values of some parameters, every combination or those that a search draws, and their results in one table.

Each is a run like any other: of the same key as `longlora run --set ...` gives it, so what was computed before is not computed
again, and the same sweep again goes on where it stopped. In MLflow the runs of a sweep are found together by a tag.
"""

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dvc.exceptions import DvcException
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich.table import Column
from rich.text import Text

from flows.cli.axes import axis_values, key_of, must_be_given_once, range_of
from flows.cli.listing import verdict_word
from flows.cli.search import Search
from flows.cli.terminal import console, plain_table
from flows.parameters import must_all_be_right
from flows.run_dir import is_finished, open_run_dir
from longlora.check_paths import LENGTHLESS, MEASURES
from tasks import promotion, runs, servers, storage, tracking
from tasks.comparison import Better, better_of, comparisons_of, settings_of, values_of
from tasks.declared import Artifact
from tasks.errors import one_line
from tasks.locks import hold
from tasks.overlay import merged, sections_of
from tasks.stage_process import InterruptedStageError, StageError
from tasks.tags import SWEEPS
from tasks.workspace import Project, Snapshot, files_now, snapshot

FAILURES = (StageError, TimeoutError, ValueError, DvcException, MlflowException)
"""Of one run: the others go on."""

SECTIONS = MEASURES | LENGTHLESS
"""By the first word of a metric that the gate's rules ask for, how it is measured; of others the section has that very name."""
TEXTS = ("blocks.held_out", "blocks.seed")
"""What says which documents are measured on."""
SOURCE = tuple(f"blocks.{key}" for key in ("source", "name", "split", "field"))
"""What says of which documents they are, unless `blocks.held_out.texts` does."""


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    values: tuple[str, ...]
    """As `key=value`, in the order of the command line."""
    snapshot: Snapshot


@dataclass(frozen=True)
class Result:
    point: Point
    failure: str
    """The run's last words; '' if it did well."""
    verdict: str
    score: float | None
    """The metric that champions are compared by, at the longest length."""
    at: int
    """That length in tokens; 0 for a metric without lengths."""
    refusals: int
    """Rules of the gate that it fails."""
    ground: tuple[str, ...] = ()
    """On what and how the score was measured: scores on other grounds do not compare."""


@dataclass(frozen=True)
class Sweep:
    """Runs that are made one after the other, and found together."""

    where: Project
    model: Artifact
    name: str
    """Its word in the tag of its runs."""
    count: int
    """How many runs at most."""
    results: dict[str, Result] = field(default_factory=dict)
    """By the run's key, in the order of the runs."""

    def run(self, point: Point) -> Result:
        """What came of the point's run, which is not run again if it was here.

        Raises:
            ValueError: nobody answers at MLFLOW_TRACKING_URI.
        """
        from flows.pipeline import pipeline_of

        key = point.snapshot.key
        if key not in self.results:
            print(f"\nrun {len(self.results) + 1} of {self.count}, {key}: {' '.join(point.values)}", flush=True)
            failure = attempt(self.where, point, pipeline_of)
            self.results[key] = unrecorded(point, failure)  # what is known should MLflow be gone
            client = tracking.connect()
            self.results[key] = result(client, self.where, self.model, point, failure=failure, sweep=self.name)
        return self.results[key]


def sweep(
    where: Project,
    axes: list[str],
    *,
    recipe: str | None,
    overrides: list[str],
    trials: int | None = None,
    seed: int | None = None,
) -> list[Result]:
    """Run every combination of the values in `axes` (each `key=value,value`), one after the other; show and return the results.

    Args:
        trials: draw so many combinations instead, each by the scores of those before; then a key may have a range, too.
        seed: of these draws; 1 if it is not given.

    Raises:
        ValueError: a wrong key, value or recipe, or two combinations are the same run: nothing has begun then; or MLflow is gone,
            or data that a search began with has changed.
    """
    must_be_given_once(axes, overrides)
    if trials is not None:
        seed = 1 if seed is None else seed
        return search(where, axes, recipe=recipe, overrides=overrides, trials=trials, seed=seed)
    if seed is not None:
        raise ValueError(
            f"--seed {seed}: is of the draws of a search, so give --trials, too; without, every combination is run"
        )
    return grid(where, axes, recipe=recipe, overrides=overrides)


def grid(where: Project, axes: list[str], *, recipe: str | None, overrides: list[str]) -> list[Result]:
    """Every combination."""
    found = points(where, axes, recipe=recipe, overrides=overrides)
    with begun(Sweep(where, runs.model_at(where), name_of(found), len(found)), found) as made:
        return [made.run(point) for point in found]


def search(
    where: Project, axes: list[str], *, recipe: str | None, overrides: list[str], trials: int, seed: int
) -> list[Result]:
    """Combinations that are drawn, the better ones the more of them are run."""
    model = runs.model_at(where)
    better = better_of(model)
    if better is None:
        raise ValueError(f"--trials: dvc.yaml does not say by which metric {model.name} is better (meta: better)")
    files = files_now(where, recipe=recipe)  # what is drawn later is of the same files
    must_not_judge([*map(key_of, axes)], model, merged(files.params, recipe=files.recipe, overrides=overrides))
    draws = Search({key_of(axis): range_of(axis) or axis_values(axis) for axis in axes}, better, seed=seed)

    def point_of(values: tuple[str, ...]) -> Point:
        return Point(values, snapshot(where, recipe=recipe, overrides=[*overrides, *values], files=files))

    looked_at = [point_of(values) for values in draws.looked_at()]
    name = digest([*axes, str(seed), looked_at[0].snapshot.key])
    with begun(Sweep(where, model, name, trials), looked_at) as made:
        for _ in range(trials):
            trial, values = draws.ask()
            known = made.run(point_of(values))
            draws.tell(trial, known.score, refusals=known.refusals)
    return [*made.results.values()]


def must_not_judge(keys: list[str], model: Artifact, params: str) -> None:
    """Raises ValueError: one of the `keys` says how runs by `params`, the text of a params.yaml, are measured or judged."""
    sections = sections_of(params)
    elsewhere = ((sections.get("blocks") or {}).get("held_out") or {}).get("texts")
    goes_by = {each: "held-out texts are chosen" for each in (*TEXTS, *(() if elsewhere else SOURCE))}
    goes_by |= {each: "the gate judges" for each in promotion.JUDGES}
    for path, word in re.findall(r'"((\w+)/[^"]+)"', json.dumps(sections.get("gate"))):
        goes_by.setdefault(SECTIONS.get(word) or word, f"{path} is measured")
    for better in reversed(comparisons_of(model)):
        goes_by |= {section: f"{better.metric} is measured" for section in better.sections}
    questions = sections.get("longqa") or {}
    if "longqa" in goes_by and questions.get("held_out"):  # the casebook writes what is asked there
        goes_by["pairs.casebook"] = goes_by["longqa"]
    for key, (part, told) in itertools.product(keys, goes_by.items()):
        if part.partition(".")[0] in sections and (f"{key}.".startswith(f"{part}.") or part.startswith(f"{key}.")):
            raise ValueError(
                f"sweep {key}: says how {told}, and a search goes by that: set one value, or leave --trials away and run them all"
            )


@contextmanager
def begun(made: Sweep, looked_at: list[Point]) -> Generator[Sweep]:
    """Check the points `looked_at`, and have ready what the runs of a sweep need. However it ends, the results are shown."""
    where = made.where
    must_all_be_right(where, [point.snapshot for point in looked_at if not storage.noted(where, point.snapshot.key)])
    tracking.connect()  # nobody there is said now
    try:
        with servers.prefect_api(where) as ready:
            importlib.import_module("flows.pipeline")  # it takes two seconds while the server starts

            ready()
            yield made
    finally:
        if made.results:
            show([*made.results.values()], better_of(made.model), made.name)


def points(where: Project, axes: list[str], *, recipe: str | None, overrides: list[str]) -> list[Point]:
    """Every combination, the last key's values varying fastest. Each is checked, as `longlora run` would."""
    for axis in axes:
        if range_of(axis):
            raise ValueError(f"sweep {axis!r}: is a range: say how many runs search it, such as --trials 12")
    values = [axis_values(axis) for axis in axes]
    files = files_now(where, recipe=recipe)
    found: dict[str, Point] = {}
    for combination in itertools.product(*values):
        taken = snapshot(where, recipe=recipe, overrides=[*overrides, *combination], files=files)
        if taken.key in found:
            first, second = " ".join(found[taken.key].values), " ".join(combination)
            raise ValueError(f"{first} and {second} are the same run: give each value once")
        found[taken.key] = Point(combination, taken)
    return list(found.values())


def name_of(found: list[Point]) -> str:
    """The same for the same runs, so that a sweep that goes on is the same sweep."""
    return digest(sorted(point.snapshot.key for point in found))


def digest(words: list[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def attempt(where: Project, point: Point, run: Callable[[Snapshot], object]) -> str:
    """Run `point` if it is not recorded yet; why it failed, or ''."""
    try:
        with hold(where, point.snapshot.key):
            done = is_finished(open_run_dir(where, point.snapshot))
        if done:
            print("every stage is unchanged, and the run is recorded", flush=True)
        else:
            run(point.snapshot)
    except InterruptedStageError:
        raise
    except FAILURES as error:
        return failed(error)
    return ""


def failed(error: Exception) -> str:
    failure = one_line(error)
    print(f"failed: {failure}", flush=True)
    return failure


def unrecorded(point: Point, failure: str) -> Result:
    return Result(point, failure or "it was not recorded", "", None, 0, 0)


def result(client: MlflowClient, where: Project, model: Artifact, point: Point, *, failure: str, sweep: str) -> Result:
    """What MLflow knows of the point's run; if it or the run's record does not tell, that is a failure."""
    try:
        return known(client, where, model, point, failure=failure, sweep=sweep)
    except FAILURES as error:
        return unrecorded(point, failure or failed(error))


def known(client: MlflowClient, where: Project, model: Artifact, point: Point, *, failure: str, sweep: str) -> Result:
    """What MLflow knows of the point's run, which is tagged as one of `sweep`."""
    run = tracking.find(client, where, tracking.experiment_id(client, where, model.name), point.snapshot.key)
    if run is None:  # it failed before it began
        return unrecorded(point, failure)
    tracking.join_sweep(client, run, sweep)
    better = better_of(model)
    values = list(values_of(client, run.info.run_id, better).items()) if better and not failure else []
    at, score = values[-1] if values else (0, None)
    verdict = "" if failure else verdict_word(run)
    ground = (str(at), *measured_by(where, run, better)) if better and not failure else ()
    refusals = 0
    if verdict == "refused":
        refusals = sum(not rule.get("passed") for rule in promotion.verdict_of(where, run).get("rules", [])) or 1
    return Result(point, failure, verdict, score, at, refusals, ground)


def measured_by(where: Project, run: Run, better: Better) -> list[str]:
    """The hash of the data that `run` was measured on by `better`, and the parameters that say how."""
    settings = sorted(settings_of(run, better).items())
    return [runs.digests_of(where, run).get(better.data or "", ""), *(f"{name}={value}" for name, value in settings)]


def show(results: list[Result], better: Better | None, name: str) -> None:
    """The table; the best score of those that passed is marked."""
    keys = [key_of(value) for value in results[0].point.values]
    table = plain_table(Column("run", no_wrap=True), *keys, "verdict", better.metric if better else "", "")
    good = [each for each in results if each.score is not None and each.verdict != "refused"]
    comparable = len({each.ground for each in good}) == 1
    scores = [each.score for each in good if each.score is not None] if comparable else []
    best = (min if better and better.order == "lower" else max)(scores, default=None)
    for each in results:
        score = "" if each.score is None else f"{each.score:.4g}" + (f" at {each.at}" if each.at else "")
        note = each.failure or ("best" if each.score == best and each.verdict != "refused" and best is not None else "")
        values = [value.partition("=")[2] for value in each.point.values]
        words = [each.point.snapshot.key, *values, "failed" if each.failure else each.verdict, score, note]
        table.add_row(*map(Text, words))
    console().print()
    console().print(table)
    if good and not comparable:
        console().print(
            "no best: measured at other lengths, places or texts, or in another precision, the scores do not compare",
            soft_wrap=True,
        )
    console().print(f"in MLflow: tags.`{SWEEPS}` LIKE '%{name}%'", highlight=False, soft_wrap=True)
