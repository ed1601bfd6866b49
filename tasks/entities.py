"""What DVC's files hold, as MLflow's entities: parameters, metrics, curves, pictures, data sets."""

import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from tasks.stages import Out

LONGEST_PARAM = 6000  # characters: MLflow's own limit
PICTURES = {".png", ".svg", ".jpg", ".html", ".md", ".json"}


def flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested parameters as (dotted name, text)."""
    if isinstance(values, dict):
        return [
            pair for key, value in values.items() for pair in flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    text = values if isinstance(values, str) else json.dumps(values)
    return [(prefix, text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - 1] + "…")]


def measured(values: Any, path: tuple[str, ...] = ()) -> tuple[list[Metric], list[tuple[str, str]]]:
    """Nested scores as metrics, names joined by '/', and what is no number as tags.

    A name that is a whole number is a length: it becomes the metric's step, so that MLflow draws the score over lengths. The name
    `value` is left out: beside `low` and `high` it is the score itself.
    """
    if isinstance(values, dict):
        parts = [measured(value, (*path, str(key))) for key, value in values.items()]
        return [metric for part in parts for metric in part[0]], [word for part in parts for word in part[1]]
    if isinstance(values, bool | int | float):
        steps = [int(name) for name in path if name.isdecimal()]
        parts = [part for part in path if not part.isdecimal()]
        name = "/".join(parts[:-1] if parts[1:] and parts[-1] == "value" else parts)
        return [Metric(name, float(values), now(), steps[-1] if steps else 0)], []
    if values is None:
        return [], []
    text = values if isinstance(values, str) else json.dumps(values)
    return [], [("/".join(path), text[:5000])]


def curve(folder: Path, out: Out) -> Iterator[Metric]:
    """The points of a CSV plot: one metric per column. A last line still being written is left for the next call."""
    path = folder / out.path
    if path.suffix != ".csv" or not path.exists():
        return
    text = path.read_text()
    step_column = str(out.options.get("x", "step"))
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        step = number(row.get(step_column))
        for column, cell in row.items():
            value = number(cell)
            if step is not None and value is not None and column != step_column:
                yield Metric(f"{path.stem}/{column}", value, now(), int(step))


def number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) or cell in ("nan", "inf", "-inf") else None


def pictures(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    small = [file for file in files if file.suffix in PICTURES and file.is_file()]
    return small if any(file.suffix in PICTURES - {".json"} for file in small) else []


def dataset(stage: str, out: Out) -> DatasetInput:
    """An output as an MLflow dataset: its DVC hash is the digest."""
    source = json.dumps({"path": out.path, "md5": out.md5, "bytes": out.size})
    entity = Dataset(name=out.path, digest=str(out.md5)[:36], source_type="dvc", source=source)
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", stage)])


def now() -> int:
    return int(time.time() * 1000)
