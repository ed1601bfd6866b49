"""The scores of a run: every JSON and CSV below a folder, and how a rule names one of them.

What is missing or not a number is an error here, never skipped.
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from longlora.evaluation.interval import grouped

FACTS = ("integrity", "licence")
"""What is scored of the run, and not of one model after another."""
SHORT, LONG = "short", "long"
EACH = (SHORT, LONG)
"""Names that stand for several lengths."""


@dataclass(frozen=True)
class Score:
    """A metric with the ends of its interval (NaN where there is none); `label` is its path, names resolved."""

    label: str
    value: float
    low: float
    high: float
    reason: str


class UnscoredError(Exception):
    """A metric is missing or not a number. The text says which."""


@dataclass(frozen=True)
class Scores:
    """All scores of a folder: nested numbers, and per metric path and length the nats of each place."""

    tree: dict[str, Any]
    parts: dict[str, dict[tuple[str, str], tuple[float, float]]]

    def find(self, path: str) -> Score:
        """The metric at `path`.

        Raises:
            UnscoredError: it is missing (the nearest there is, is named) or not a number.
        """
        node: Any = self.tree
        names: list[str] = []
        for name in path.split("/"):
            name = self.resolved(name, node, path=path)
            if not isinstance(node, dict) or name not in node:
                known = [k for k, v in node.items() if isinstance(v, dict)] if isinstance(node, dict) else []
                close = get_close_matches(name, known, n=1) or known
                raise UnscoredError(
                    f"{'/'.join([*names, name])} was not scored; there are {', '.join(close) or 'no scores'}"
                )
            node = node[name]
            names.append(name)
        label = "/".join(names)
        figures = figures_of(node)
        value, low, high = (number(figures.get(end)) for end in ("value", "low", "high"))
        if not math.isfinite(value):
            raise UnscoredError(f"{label} is not a number")
        return Score(label, value, low, high, str(figures.get("reason", "")))

    def ratio(self, above: Sequence[str], below: Sequence[str]) -> tuple[float, float, float] | None:
        """Of perplexities over the same places, by their resolved paths: the product of those `above` by that of those `below`, and
        the ends of the 95 % interval (NaN where all places are of one document). None where their places are not the same."""
        scored = [self.parts.get(label) for label in (*above, *below)]
        ours = scored[0]
        if ours is None or any(places is None or places.keys() != ours.keys() for places in scored):
            return None
        signs = [1] * len(above) + [-1] * len(below)
        tokens = np.array([tokens for tokens, _ in ours.values()])
        difference = np.array([sum(s * p[at][1] for s, p in zip(signs, scored, strict=True) if p) for at in ours])
        low, high = grouped(difference, counts_N=tokens, groups_N=[document for document, _ in ours])
        with np.errstate(over="ignore"):  # infinite where a model is that bad
            middle, low, high = np.exp([difference.sum() / tokens.sum(), low, high]).tolist()
        return middle, low, high

    def resolved(self, name: str, node: Any, *, path: str) -> str:
        """`name`, or the length that `target`, `window` and `lowest` stand for among the lengths measured at `node`."""
        if name not in ("target", "window", "lowest") or path.startswith("integrity/"):
            return name
        if name == "target":
            return str(int(self.find("integrity/target").value))
        inside = [str(n) for n in self.inside((int(k) for k in node if k.isdigit()), path=path)]
        if name == "window":
            return inside[-1]
        values = {k: number(figures_of(node[k]).get("value")) for k in inside}
        # what is no number comes first, so that it is found, and refused
        return min(values, key=lambda k: (math.isfinite(values[k]), values[k]))

    def lengths(self, which: str, *, before: list[str]) -> list[int]:
        """The lengths that `which` of EACH stands for behind the names `before`.

        Raises:
            UnscoredError: there is none.
        """
        nodes: list[Any] = [self.tree]
        for depth, name in enumerate(before):  # the second name is the model's: any will do
            nodes = [
                below
                for node in nodes
                if isinstance(node, dict)
                for key, below in node.items()
                if depth == 1 or key == name
            ]
        scored = {int(name) for node in nodes if isinstance(node, dict) for name in node if name.isdigit()}
        if which == SHORT:
            return self.inside(scored, path="/".join(before))
        window, target = (int(self.find(f"integrity/{name}").value) for name in ("window", "target"))
        return sorted({n for n in scored if n > window} | {target})

    def inside(self, scored: Iterable[int], *, path: str) -> list[int]:
        """Of the scored lengths those inside the base's window, in order. Any model reads a few tokens as well as before, and
        more of them better: so they must reach half of the window, or of the target where that is shorter.

        Raises:
            UnscoredError: none does.
        """
        window, target = (int(self.find(f"integrity/{name}").value) for name in ("window", "target"))
        inside = sorted(n for n in scored if n <= window)
        if not inside or 2 * inside[-1] < min(window, target):
            least = -(-min(window, target) // 2)
            raise UnscoredError(f"{path}: no length from {least} up to the base's window, {window}, was scored")
        return inside


def figures_of(node: Any) -> dict[str, Any]:
    return node if isinstance(node, dict) else {"value": node}


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read(folder: Path) -> Scores:
    """Every JSON and CSV below `folder`.

    Raises:
        ValueError: there is none, one is not JSON, or two hold the same score.
    """
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise ValueError(f"no scores below {folder}")
    tree: dict[str, Any] = {}
    for file in files:
        try:
            join(tree, json.loads(file.read_text()), file=file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {error.lineno}: {error.msg}") from None
    parts: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for file in sorted(folder.rglob("*.csv")):
        label = "/".join(file.relative_to(folder).with_suffix("").parts)
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                places = parts.setdefault(f"{label}/{row['length']}", {})
                places[row["document"], row["end"]] = float(row["tokens"]), float(row["nats"])
    return Scores(tree | {"numbers": numbers(tree)}, parts)


def numbers(tree: dict[str, Any]) -> dict[str, Any]:
    """Per model a fact, whether each of its scores is a number: the rules may not ask for all of them."""
    measures = {name: scored for name, scored in tree.items() if name not in FACTS and isinstance(scored, dict)}
    facts = {}
    for label in sorted({label for scored in measures.values() for label in scored}):
        bad = [gap for name, scored in measures.items() for gap in gaps(scored.get(label), path=f"{name}/{label}")]
        are = "score is no number" if len(bad) == 1 else "scores are no numbers"
        told = f"{len(bad)} {are}, {bad[0]} first" if bad else "every score is a number"
        facts[label] = {"value": int(not bad), "reason": told}
    return facts


def gaps(node: Any, *, path: str) -> list[str]:
    """The scores at and below `node` that are not numbers."""
    if not isinstance(node, dict):
        return []
    own = [path] if "value" in node and not math.isfinite(number(node["value"])) else []
    return own + [gap for name, below in node.items() for gap in gaps(below, path=f"{path}/{name}")]


def join(tree: dict[str, Any], more: dict[str, Any], *, file: Path, path: str = "") -> None:
    """Put `more`, of `file`, into `tree`, level by level.

    Raises:
        ValueError: `tree` has one of its scores already.
    """
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            join(tree[key], value, file=file, path=f"{path}{key}/")
        elif key in tree:
            raise ValueError(f"{file} says {path}{key}, as another file of scores does: one of them must go")
        else:
            tree[key] = value
