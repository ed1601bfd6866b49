"""The rules a model must pass before anybody may promote it: data in params.yaml, applied to the scores, with a reason each.

Perplexity and a passkey alone have promoted models that cannot retrieve: the default rules ask for wholeness, for what the
base could do before, and for more than untrained rotary scaling gives away for nothing. What is missing or not a number is
refused, never skipped.
"""

import math
from collections import Counter
from typing import Any, Self

from pydantic import Field, model_validator

from longlora.report.scores import EACH, Score, Scores, UnscoredError
from longlora.section import Section, nearest

NO_SPREAD = "it takes more than one document, or one trial, to show how far chance could have moved it"
UNTRAINED = "untrained"
"""In a rule's paths, the model that the training started from: the base under the run's own scaling."""
ROUNDING = 1e-3
"""Of a score, far more than its file rounds by."""
TIE = 2e-6
"""By how much a score may miss what is required: files round to six digits, so that 36 keys of 60 are less than 0.9 x 40 of 60;
and the computer rounds, for which 6 of 40 are less than 8 of 40 - 0.05."""


class Rule(Section):
    name: str = Field(pattern=r"\S")
    """What is claimed, in words."""
    metric: str
    """Path in the scores, `perplexity/extended/target`. `target` is the context that was trained for, `window` the longest
    measured length inside the base's own, `lowest` that of them with the lowest value. In a model's place, `untrained` is the base
    under the run's own scaling, from which the training started. `short` and `long` ask the rule of every length at which any
    model was scored: of those inside the base's window, and of those beyond it and the target. What is measured inside must
    reach half of the window, or of the target where that is shorter.
    `numbers/extended` is 1 where each score of the model is a number."""
    at_most: float | None = None
    """The highest value that passes."""
    at_least: float | None = None
    """The lowest; a rule has one of the two."""
    times: str | None = Field(None, min_length=1)
    """A reference metric by which the bound is multiplied; `short` or `long` in it is the metric's length."""
    plus: str | None = Field(None, min_length=1)
    """A reference metric that is added to the bound."""
    ratio_at: str | None = Field(None, min_length=1)
    """A length, `window` for one: the bound is also multiplied by the ratio of metric and `times` there. So at_most: 1 claims
    that the one gains on the other from that length to the metric's own."""
    with_interval: bool = False
    """Whether the claim must hold at the unfavourable end of the 95 % interval: of the ratio, place by place, where both were
    scored at the same places; else of both metrics, each at its own unfavourable end. Without an interval (a single document
    shows no spread) it does not hold; nor does one with `ratio_at` unless all four were scored at the same places."""

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

    @model_validator(mode="after")
    def ratio_is_of_two_metrics_at_another_length(self) -> Self:
        if self.ratio_at is None:
            return self
        if self.times is None:
            raise ValueError(
                f"rule '{self.name}' has ratio_at, which takes times: the ratio is that of metric and times"
            )
        lengths = {(*path.split("/"), "", "")[2] for path in (self.metric, self.times)}
        if len(lengths) > 1 or lengths & {"", *EACH}:
            raise ValueError(
                f"rule '{self.name}' has ratio_at, which takes metric and times at one and the same length"
            )
        if self.ratio_at in {*EACH, "lowest", *lengths}:
            raise ValueError(
                f"rule '{self.name}' has ratio_at {self.ratio_at}: one other length is meant, window for one"
            )
        if self.with_interval and not all(path.startswith("perplexity/") for path in (self.metric, self.times)):
            raise ValueError(
                f"rule '{self.name}' has ratio_at with an interval, which takes perplexities: they have places"
            )
        return self

    @property
    def upper(self) -> bool:
        """Whether the bound is the highest value that passes."""
        return self.at_most is not None

    @property
    def bound(self) -> float:
        bound = self.at_most if self.at_most is not None else self.at_least
        assert bound is not None
        return bound

    @property
    def paths(self) -> list[str]:
        """The metrics that it asks for."""
        asked = [path for path in (self.metric, self.times, self.plus) if path]
        return asked + [self.elsewhere(path) for path in asked if self.ratio_at]

    def elsewhere(self, path: str) -> str:
        """`path` at the length `ratio_at`."""
        measure, label, _, *rest = path.split("/")
        return "/".join([measure, label, str(self.ratio_at), *rest])

    def with_name(self, name: str, instead: str) -> Self:
        """The rule with `name` in its paths replaced."""
        paths = {field: getattr(self, field) for field in ("metric", "times", "plus")}
        return self.model_copy(
            update={
                field: path and "/".join(instead if part == name else part for part in path.split("/"))
                for field, path in paths.items()
            }
        )


class NotAsked(Section):
    name: str
    """Of a rule in `gate.rules` or `gate.more_rules`."""
    why: str = Field(pattern=r"\S")
    """Why it says nothing of this run, in words, for whoever reads the verdict."""


class Gate(Section):
    rules: list[Rule] = Field(min_length=1)
    """All must hold. No rule at all would let everything through."""
    more_rules: list[Rule]
    """These must hold as well: for a recipe, or for `--set`, which would replace the whole of `rules`."""
    not_asked: list[NotAsked]
    """Those that a recipe leaves out. Verdict, card and promotion tell them and why."""

    @model_validator(mode="after")
    def some_rule_is_asked(self) -> Self:
        known = [rule.name for rule in (*self.rules, *self.more_rules)]
        left = [each.name for each in self.not_asked]
        for name, times in Counter(known).items():
            if times > 1:  # not_asked would leave out both, and a verdict could not tell them apart
                raise ValueError(f"{times} rules are called '{name}'")
        for name in left:
            if name not in known:
                raise ValueError(f"not_asked has '{name}', which is no rule of the gate{nearest(name, known)}")
        if not {rule.name for rule in self.rules} - {*left}:
            raise ValueError("not_asked leaves no rule of gate.rules")
        return self

    @property
    def every_rule(self) -> list[Rule]:
        """Those that are asked."""
        left = {each.name for each in self.not_asked}
        return [rule for rule in (*self.rules, *self.more_rules) if rule.name not in left]

    def under(self, method: str) -> Self:
        """The rules of a run whose `position.method` this is, UNTRAINED by its label."""
        label = "base" if method == "none" else method
        lists = {"rules": self.rules, "more_rules": self.more_rules}
        return self.model_copy(
            update={key: [rule.with_name(UNTRAINED, label) for rule in rules] for key, rules in lists.items()}
        )


def judge(gate: Gate, *, scores: Scores) -> dict[str, Any]:
    """The verdict: `passed`, for each rule whether it holds and why, and the rules that were not asked, and why not."""
    rules = []
    for rule in gate.every_rule:
        try:
            found = [apply(each, scores=scores) for each in at_each_length(rule, scores=scores)]
            passed = all(held for held, _ in found)
            reason = "; ".join(said for held, said in found if held is passed)
        except UnscoredError as gap:
            passed, reason = False, str(gap)
        rules.append({"name": rule.name, "passed": passed, "reason": reason})
    return {
        "passed": all(r["passed"] for r in rules),
        "rules": rules,
        "not_asked": [each.model_dump() for each in gate.not_asked],
    }


def at_each_length(rule: Rule, *, scores: Scores) -> list[Rule]:
    """The rule for each length that its metric speaks of.

    Raises:
        UnscoredError: it speaks of lengths of which none was scored.
    """
    names = rule.metric.split("/")
    which = next((word for word in EACH if word in names), None)
    if which is None:
        return [rule]
    return [rule.with_name(which, str(length)) for length in scores.lengths(which, before=names[: names.index(which)])]


def apply(rule: Rule, *, scores: Scores) -> tuple[bool, str]:
    """Whether the rule holds, and a sentence with the numbers.

    Raises:
        UnscoredError: a metric is missing, not a number, or the same as its reference.
    """
    metric = scores.find(rule.metric)
    path = rule.times or rule.plus
    reference = scores.find(path) if path else None
    if reference and reference.label == metric.label:
        raise UnscoredError(f"{metric.label} cannot be compared with itself")
    required = f"required: at {'most' if rule.upper else 'least'} {rule.bound:g} x"
    if reference and rule.ratio_at:
        metric_there, reference_there = (scores.find(rule.elsewhere(path)) for path in rule.paths[:2])
        if metric_there.label == metric.label:
            raise UnscoredError(f"{metric.label} cannot be compared with itself: {rule.ratio_at} is the same length")
        held = by_ratio(rule, [metric, reference_there], [reference, metric_there], scores=scores)
        if held is None:
            raise UnscoredError(f"{metric.label} has no interval: not all four were scored at the same places")
        here, there = metric.value / reference.value, metric_there.value / reference_there.value
        return held[0], (
            f"{metric.label} is {here:.4g} of {reference.label}, where {metric_there.label} is {there:.4g} of "
            f"{reference_there.label}: {held[1]} x, {required}"
        )
    if (
        reference
        and rule.times
        and rule.with_interval
        and (held := by_ratio(rule, [metric], [reference], scores=scores))
    ):
        return held[0], (
            f"{metric.label} is {metric.value:.4g}, {held[1]} x {reference.label} = {reference.value:.4g}, {required}"
        )
    for figure in filter(None, (metric, reference)):
        if rule.with_interval and not math.isfinite(figure.low + figure.high):
            raise UnscoredError(f"{figure.label} has no interval: {NO_SPREAD}")
    upper, bound = rule.upper, rule.bound
    value = (metric.high if upper else metric.low) if rule.with_interval else metric.value
    limit, meaning = bound, f"{bound:g}"
    if reference:
        against = (reference.low if upper else reference.high) if rule.with_interval else reference.value
        limit = bound * against if rule.times else bound + against
        meaning = f"{limit:.4g} ({bound:g} {'x' if rule.times else '+'} {reference.label} = {against:.4g})"
    passed = value <= limit + TIE if upper else value >= limit - TIE
    end = f" (with its interval {value:.4g})" if rule.with_interval else ""
    reason = f"{metric.label} is {metric.value:.4g}{end}, required: at {'most' if upper else 'least'} {meaning}"
    return passed, f"{metric.reason} ({reason})" if metric.reason else reason


def by_ratio(rule: Rule, above: list[Score], below: list[Score], *, scores: Scores) -> tuple[bool, str] | None:
    """Whether the rule's bound holds of the product of `above` by that of `below`, and the ratio in words; at the unfavourable end
    of its 95 % interval, if the rule asks for one. None where it does, and they were not scored at the same places.

    Raises:
        UnscoredError: one is 0, the places are all of one document, or they are of another measurement than the scores.
    """
    ratio = scores.ratio([each.label for each in above], [each.label for each in below]) if rule.with_interval else None
    if rule.with_interval and ratio is None:
        return None
    if zero := next((each for each in (*above[1:], *below) if not each.value), None):
        raise UnscoredError(f"{zero.label} is 0, to which nothing has a ratio")
    value = math.prod(each.value for each in above) / math.prod(each.value for each in below)
    if ratio is None:
        return (value <= rule.bound + TIE if rule.upper else value >= rule.bound - TIE), f"{value:.4g}"
    named = " / ".join(each.label for each in (above[0], *below))
    by_places, low, high = ratio
    if not math.isclose(by_places, value, rel_tol=ROUNDING):
        raise UnscoredError(f"{named} is {value:.4g}, and by its places {by_places:.4g}: they are of two measurements")
    if math.isnan(low + high):
        raise UnscoredError(f"{named} has no interval: {NO_SPREAD}")
    return (high <= rule.bound if rule.upper else low >= rule.bound), f"{value:.4g} ({low:.4g} to {high:.4g})"
