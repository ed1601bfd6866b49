"""Tables of what MLflow knows: runs to compare, and the moves of the champion."""

import os
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from rich.table import Column
from rich.text import Text

from flows.cli.terminal import console, plain_table
from tasks import registry, tracking
from tasks.comparison import better_of, values_of
from tasks.declared import Artifact
from tasks.leftovers import Leftover
from tasks.registry import Move
from tasks.tags import ALIASES, DIRTY, KEY, OVERRIDES, RECIPE
from tasks.workspace import Project

NEWEST = 50  # runs that are shown unasked: the score of each is a question to MLflow
MOST = 50_000  # MLflow's own limit


def show_history(name: str, moves: list[Move], keys: dict[str, str]) -> None:
    """A row per move; `keys`: those of runs, by MLflow's ids."""
    columns = ("when (UTC)", "how", "from", "to", "who", "why", Column("run", no_wrap=True))
    table = plain_table(*columns, title=f"champion of {name}")
    for move in moves:
        run = keys.get(move.run, move.run[:12])
        table.add_row(move.when, move.how, move.origin or "-", move.to or "-", move.who, move.why, run)
    console().print(table if moves else f"{name} has had no champion yet")


def verdict_word(run: Run) -> str:
    """The gate's verdict in a word; '' where there is none."""
    return {1.0: "passed", 0.0: "refused"}.get(run.data.metrics.get("passed", -1.0), "")


def show_runs(client: MlflowClient, where: Project, model: Artifact, *, every: bool) -> None:
    """A row per run: what was varied, how it ended, its verdict, and the metric that champions are compared by."""
    better = better_of(model)
    experiment = tracking.experiment_id(client, where, model.name)
    tracking.mark_dead_runs(client, where, experiment)
    most = MOST if every else NEWEST + 1
    found = list(client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=most))
    older = not every and len(found) > NEWEST
    found = found if every else found[:NEWEST]
    titles = {}
    for alias in ALIASES:
        version = registry.holder(client, model.name, alias)
        if version:
            titles[version.run_id] = f"{titles.get(version.run_id, '')} {alias}".strip()
    measure = [better.metric] if better else []
    columns = (Column("run", no_wrap=True), "started (UTC)", "state", "recipe", "set", "verdict", *measure, "")
    table = plain_table(*columns)
    for run in found:
        tags = run.data.tags
        started = f"{datetime.fromtimestamp(run.info.start_time / 1000, UTC):%Y-%m-%d %H:%M}"
        values = list(values_of(client, run.info.run_id, better).items()) if better else []
        value = [f"{values[-1][1]:.4g} at {values[-1][0]}" if values else ""] if better else []
        dirty = " (dirty)" if tags.get(DIRTY) == "true" else ""
        table.add_row(
            tags.get(KEY, run.info.run_id) + dirty,
            started,
            run.info.status.lower(),
            tags.get(RECIPE, ""),
            tags.get(OVERRIDES, ""),
            verdict_word(run),
            *value,
            titles.get(run.info.run_id, ""),
        )
    console().print(table if found else f"no runs in MLflow's experiment '{model.name}' yet: `longlora run`")
    if older:
        print(f"the newest {NEWEST}; --all shows the others too")


def shown(path: Path, where: Project) -> Path:
    """`path` as seen from the project, unless it lies elsewhere."""
    return path.relative_to(where.root) if path.is_relative_to(where.root) else path


def show_leftovers(found: list[Leftover], where: Project) -> None:
    table = plain_table("size", "what", "where", "why")
    table.columns[0].justify = "right"
    for each in found:
        home = os.path.commonpath([shown(path, where) for path in each.paths])
        table.add_row(f"{each.size / 1e6:,.3f} MB", each.kind, Text(home), each.why)
    console().print(table if found else "nothing may go")
