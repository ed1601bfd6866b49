"""What a run says at its end: its stages, its report, where to look."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from flows.run_dir import RunDir
from tasks.stages import Stage

PICTURES = {".png", ".svg", ".html"}
MARKS = {
    "unchanged": "[green]unchanged",
    "restored": "[cyan]restored from the cache",
    "stale": "[yellow]to be computed",
}


def console() -> Console:
    """Standard output; wide if it is no terminal, where a line must not be cut to fit."""
    return Console(width=None if sys.stdout.isatty() else 160)


def plain_table(*columns: Column | str, title: str | None = None, header: bool = True) -> Table:
    """A table without lines. What is wider than its column goes on below, where Rich would cut it; but not in a column that says
    no_wrap, as those of keys do."""
    table = Table(*columns, title=title, title_justify="left", show_header=header, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "ellipsis" if column.no_wrap else "fold"
    return table


def show_plan(stages: list[Stage]) -> None:
    table = plain_table("stage", "state", "what it does")
    for stage in stages:
        table.add_row(stage.name, MARKS[stage.status], stage.desc)
    console().print(table)


def show_report(run_dir: RunDir) -> None:
    """The run's summary, its pictures, and the command that opens the pages."""
    out, here = console(), Path.cwd()
    text = run_dir.summary()
    if text:
        out.print(Markdown(text))
    files = [file for file in run_dir.report() if file.suffix in PICTURES]
    for file in [file for file in files if file.suffix == ".html"] or files:  # a page has its pictures in it
        out.print(file.relative_to(here) if file.is_relative_to(here) else file, highlight=False, soft_wrap=True)
    out.print(f"run {run_dir.snapshot.key} in {run_dir.folder}", highlight=False, soft_wrap=True)
    out.print("`longlora up` opens the pages of MLflow and Prefect, `longlora runs` compares runs.", highlight=False)
