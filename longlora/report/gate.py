"""The rules a model must pass before anybody may promote it: data in params.yaml, applied to the scores, with a reason each.

Perplexity and a passkey alone have promoted models that cannot retrieve: the default rules ask for wholeness, for what the
base could do before, and for more than untrained rotary scaling gives away for nothing. What is missing or not a number is
refused, never skipped.
"""

import csv
import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from longlora.evaluation.interval import grouped
from longlora.section import Section

FACTS = ("integrity", "licence")
"""What is scored of the run, and not of one model after another."""
SHORT, LONG = "short", "long"
EACH = (SHORT, LONG)
"""Names that stand for several lengths."""


class Rule(Section):
    name: str = Field(min_length=1)
    """What is claimed, in words."""
    metric: str
    """Path in the scores, `perplexity/extended/target`. `target` is the context that was trained for, `window` the longest
    measured length inside the base's own. `short` and `long` ask the rule of every length at which any model was scored: of those
    inside the base's window, and of those beyond it and the target. `numbers/extended` is 1 where each score of the model is a
    number."""
    at_most: float | None = None
    """The highest value that passes."""
    at_least: float | None = None
    """The lowest; a rule has one of the two."""
    times: str | None = None
    """A reference metric by which the bound is multiplied; `short` or `long` in it is the metric's length."""
    plus: str | None = None
    """A reference metric that is added to the bound."""
    with_interval: bool = False
    """Whether the claim must hold at the unfavourable end of the 95 % interval: of the ratio, place by place, where both were
    scored at the same places; else of both metrics, each at its own unfavourable end. Without an interval (a single document
    shows no spread) it does not hold."""

    @model_validator(mode="after")
    def one_bound_and_at_most_one_reference(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"rule '{self.name}' needs one of at_most and at_least")
        if self.times is not None and self.plus is not None:
            raise ValueError(f"rule '{self.name}' has both times and plus; one reference is meant")
        reference = (self.times or self.plus or "").split("/")
        for word in EACH:
            if word in reference and word not in self.metric.split("/"):
                raise ValueError(f"rule '{self.name}' has {word} in its reference alone; it is the metric's length")
        return self


class Gate(Section):
    rules: list[Rule] = Field(min_length=1)
    """All must hold. No rule at all would let everything through."""


@dataclass(frozen=True)
class Score:
    """A metric with the ends of its interval (NaN where there is none); `label` is its path, names resolved."""

    label: str
    value: float
    low: float
    high: float
    reason: str


NO_SPREAD = "it takes more than one document, or one trial, to show how far chance could have moved it"


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
        figures = node if isinstance(node, dict) else {"value": node}
        value, low, high = (number(figures.get(end)) for end in ("value", "low", "high"))
        if not math.isfinite(value):
            raise UnscoredError(f"{label} is not a number")
        return Score(label, value, low, high, str(figures.get("reason", "")))

    def resolved(self, name: str, node: Any, *, path: str) -> str:
        """`name`, or the length that `target` and `window` stand for among the lengths measured at `node`."""
        if name not in ("target", "window") or path.startswith("integrity/"):
            return name
        length = int(self.find(f"integrity/{name}").value)
        if name == "target":
            return str(length)
        inside = [int(k) for k in node if k.isdigit() and int(k) <= length]
        if not inside:
            raise UnscoredError(f"{path}: no length up to the base's window, {length}, was scored")
        return str(max(inside))

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
        window = int(self.find("integrity/window").value)
        if which == LONG:
            return sorted({n for n in scored if n > window} | {int(self.find("integrity/target").value)})
        if not (inside := sorted(n for n in scored if n <= window)):
            raise UnscoredError(f"{'/'.join(before)}: no length up to the base's window, {window}, was scored")
        return inside


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
        told = f"{len(bad)} scores are not numbers, {bad[0]} first" if bad else "every score is a number"
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


def judge(gate: Gate, *, scores: Scores) -> dict[str, Any]:
    """The verdict: `passed`, and for each rule whether it holds and why."""
    rules = []
    for rule in gate.rules:
        try:
            found = [apply(each, scores=scores) for each in at_each_length(rule, scores=scores)]
            passed = all(held for held, _ in found)
            reason = "; ".join(said for held, said in found if held is passed)
        except UnscoredError as gap:
            passed, reason = False, str(gap)
        rules.append({"name": rule.name, "passed": passed, "reason": reason})
    return {"passed": all(r["passed"] for r in rules), "rules": rules}


def at_each_length(rule: Rule, *, scores: Scores) -> list[Rule]:
    """The rule for each length that its metric speaks of.

    Raises:
        UnscoredError: it speaks of lengths of which none was scored.
    """
    names = rule.metric.split("/")
    which = next((word for word in EACH if word in names), None)
    if which is None:
        return [rule]

    def at(length: int, path: str | None) -> str | None:
        return path and "/".join(str(length) if name == which else name for name in path.split("/"))

    return [
        rule.model_copy(update={field: at(length, getattr(rule, field)) for field in ("metric", "times", "plus")})
        for length in scores.lengths(which, before=names[: names.index(which)])
    ]


def apply(rule: Rule, *, scores: Scores) -> tuple[bool, str]:
    """Whether the rule holds, and a sentence with the numbers.

    Raises:
        UnscoredError: a metric is missing or not a number.
    """
    metric = scores.find(rule.metric)
    path = rule.times or rule.plus
    reference = scores.find(path) if path else None
    if reference and rule.times and rule.with_interval and (ends := paired(scores, metric, reference)):
        return by_ratio(rule, metric=metric, reference=reference, ends=ends)
    for figure in filter(None, (metric, reference)):
        if rule.with_interval and not math.isfinite(figure.low + figure.high):
            raise UnscoredError(f"{figure.label} has no interval: {NO_SPREAD}")
    upper = rule.at_most is not None
    bound = rule.at_most if rule.at_most is not None else rule.at_least
    assert bound is not None
    value = (metric.high if upper else metric.low) if rule.with_interval else metric.value
    limit, meaning = bound, f"{bound:g}"
    if reference:
        against = (reference.low if upper else reference.high) if rule.with_interval else reference.value
        limit = bound * against if rule.times else bound + against
        meaning = f"{limit:.4g} ({bound:g} {'x' if rule.times else '+'} {reference.label} = {against:.4g})"
    passed = value <= limit if upper else value >= limit
    end = f" (with its interval {value:.4g})" if rule.with_interval else ""
    reason = f"{metric.label} is {metric.value:.4g}{end}, required: at {'most' if upper else 'least'} {meaning}"
    return passed, f"{metric.reason} ({reason})" if metric.reason else reason


def paired(scores: Scores, metric: Score, reference: Score) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of two perplexities over the same places; None where they have no places in common.

    Raises:
        UnscoredError: the places are all of one document.
    """
    ours, theirs = scores.parts.get(metric.label), scores.parts.get(reference.label)
    if ours is None or theirs is None or ours.keys() != theirs.keys():
        return None
    tokens = np.array([ours[place][0] for place in ours])
    difference = np.array([ours[place][1] - theirs[place][1] for place in ours])
    low, high = grouped(difference, counts_N=tokens, groups_N=[document for document, _ in ours])
    if not math.isfinite(low + high):
        raise UnscoredError(f"{metric.label} / {reference.label} has no interval: {NO_SPREAD}")
    return math.exp(low), math.exp(high)


def by_ratio(rule: Rule, *, metric: Score, reference: Score, ends: tuple[float, float]) -> tuple[bool, str]:
    """The rule, applied to the ratio of metric and reference at the unfavourable end of its interval."""
    upper, (low, high) = rule.at_most is not None, ends
    bound = rule.at_most if rule.at_most is not None else rule.at_least
    assert bound is not None
    return (high <= bound if upper else low >= bound), (
        f"{metric.label} is {metric.value:.4g}, {metric.value / reference.value:.4g} ({low:.4g} to {high:.4g}) x "
        f"{reference.label} = {reference.value:.4g}, required: at {'most' if upper else 'least'} {bound:g} x"
    )
