"""Two runs side by side: what was set, what they read and made, and how they scored at each length.

All of it is MLflow's; names are the same in every run, and a length is a metric's step.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.terminal import console, plain_table
from tasks import runs, tracking
from tasks.outputs import curves_at
from tasks.tags import DIRTY, HEAD, KEY, OVERRIDES, RECIPE
from tasks.workspace import Project

FACTS = {
    "recipe": RECIPE,
    "set": OVERRIDES,
    "commit": HEAD,
    "dirty": DIRTY,
    "by": "mlflow.user",
    "CPUs": "hardware.cpus",
    "GPUs": "hardware.gpus",
    "torch": "env.torch",
    "transformers": "env.transformers",
}
BOUNDS = ("/low", "/high")  # of an interval: shown behind its score


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: str
    run: Run
    metrics: dict[str, dict[int, float]]
    """By name and step, the last value."""
    data: dict[str, str]
    """Hash by output."""


def compare(where: Project, one: str, other: str, *, html: Path | None) -> None:
    """Show runs `one` and `other` (keys or MLflow ids, or their beginnings); `html`: a page of it, with the curves drawn.

    Raises:
        ValueError: there is no such run, both are the same one, or `html` cannot be written.
    """
    if html and (html.suffix != ".html" or not html.absolute().parent.is_dir() or html.is_dir()):
        raise ValueError(f"--html {html}: must be a file that ends in .html, in a folder that is there")
    client = tracking.connect()
    chosen = [runs.chosen(client, where, wanted) for wanted in (one, other)]
    if chosen[0].info.run_id == chosen[1].info.run_id:
        raise ValueError(f"{one} and {other} are the same run: `longlora runs` lists what there is to compare")
    sides = [side(client, where, run) for run in chosen]
    curves = curves_at(where.root, "HEAD")
    tables = [
        facts(sides),
        differing("parameters", "parameter", sides, [each.run.data.params for each in sides]),
        differing("data", "output", sides, [each.data for each in sides]),
        scores(sides, curves),
    ]
    for table in tables:
        console().print(table, "")
    if html:
        text = page(tables, sides, curves)
        scratch = html.with_suffix(".partial")
        scratch.write_text(text)
        scratch.replace(html)
        print(html)


def side(client: MlflowClient, where: Project, run: Run) -> Side:
    names = [key for key in run.data.metrics if not key.startswith(tracking.MACHINE)]  # the machine is not what differs
    history = {key: client.get_metric_history(run.info.run_id, key) for key in names}
    metrics = {key: {point.step: point.value for point in points} for key, points in history.items()}
    return Side(run.data.tags.get(KEY, run.info.run_id)[:12], run, metrics, runs.digests_of(where, run))


def table(title: str, sides: list[Side], *names: str, more: str = "") -> Table:
    columns = [*names, *(each.name for each in sides), *([more] if more else [])]
    return plain_table(*columns, title=title)


def add(to: Table, *cells: str) -> None:
    to.add_row(*map(Text, cells))  # as text: a value like [a] is no markup


def facts(sides: list[Side]) -> Table:
    shown = table("runs", sides, "")
    add(shown, "state", *(each.run.info.status.lower() for each in sides))
    for name, tag in FACTS.items():
        add(shown, name, *(each.run.data.tags.get(tag, "") for each in sides))
    return shown


def differing(what: str, column: str, sides: list[Side], values: list[dict[str, str]]) -> Table:
    one, other = values
    names = sorted(one.keys() | other.keys())
    differ = [name for name in names if one.get(name) != other.get(name)]
    shown = table(f"{what}: {len(differ)} of {len(names)} differ", sides, column)
    for name in differ:
        add(shown, name, one.get(name, "-"), other.get(name, "-"))
    return shown


def scores(sides: list[Side], curves: set[str]) -> Table:
    """Final metrics by length where they differ; of a curve each side's last point, their steps among the lengths."""
    rows = []
    names = sorted({name for each in sides for name in each.metrics})
    for name in names:
        if name.endswith(BOUNDS) and name.rpartition("/")[0] in names:
            continue
        both = [each.metrics.get(name, {}) for each in sides]
        places = [[step, step] for step in sorted(both[0].keys() | both[1].keys())]
        if name.partition("/")[0] in curves:
            places = [[max(points, default=0) for points in both]]
        for steps in places:
            at = " / ".join(f"{step:,}" for step in dict.fromkeys(steps) if step)
            values = [points.get(step) for points, step in zip(both, steps, strict=True)]
            known = [value for value in values if value is not None]
            difference = signed(known[1] - known[0]) if len(known) == 2 else ""
            one, other = (facts_of(each, name, step) for each, step in zip(sides, steps, strict=True))
            said = [score(one), score(other)]
            if one != other and said[0] == said[1]:
                said = [score(one, digits=9), score(other, digits=9)]
            rows.append((one != other, name, at, *said, difference))
    differ = [row for differs, *row in rows if differs]
    shown = table(f"metrics: {len(differ)} of {len(rows)} differ", sides, "metric", "at", more="difference")
    for row in differ:
        add(shown, *row)
    return shown


def signed(difference: float) -> str:
    return f"{difference:+,.0f}" if difference.is_integer() else f"{difference:+,.4g}"


def facts_of(side: Side, name: str, step: int) -> list[float | None]:
    """The value, and the ends of its interval."""
    return [side.metrics.get(name + end, {}).get(step) for end in ("", *BOUNDS)]


def score(facts: list[float | None], *, digits: int = 4) -> str:
    """The value, and its interval if it has one."""
    value, low, high = facts
    if value is None:
        return "-"
    said = f"{value:,.0f}" if value.is_integer() else f"{value:,.{digits}g}"
    return said + (f" ({low:.{digits}g} to {high:.{digits}g})" if low is not None and high is not None else "")


def page(tables: list[Table], sides: list[Side], curves: set[str]) -> str:
    """The tables, and the curves that both have, as one page without links."""
    paper = Console(record=True, width=160, file=io.StringIO())
    for each in tables:
        paper.print(each, "")
    text = paper.export_html(inline_styles=True)
    return text.replace("</body>", f"{drawn(sides, curves)}</body>")


def drawn(sides: list[Side], curves: set[str]) -> str:
    """An SVG picture per curve of both runs."""
    from matplotlib.figure import Figure

    pictures = []
    for name in sorted(sides[0].metrics.keys() & sides[1].metrics.keys()):
        if name.partition("/")[0] not in curves:
            continue
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name)
        for each in sides:
            steps = sorted(each.metrics[name])
            axes.plot(steps, [each.metrics[name][step] for step in steps], label=each.name)
        axes.legend()
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        pictures.append(picture.getvalue()[picture.getvalue().index("<svg") :])
    return "\n".join(pictures)
