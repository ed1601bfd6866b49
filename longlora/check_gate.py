"""What the gate's rules ask, held against the other sections: a rule that holds of any model, or of none, or of a few samples,
refuses a model, or lets one through, only after the training. `longlora.check` asks; where a rule's path leads is in
`longlora.check_paths`.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora.check_paths import COUNTS, ENDS, FACTS, INSIDE, LENGTHLESS, LENGTHS, MEASURES, asked_by, names_a_file

LOWEST = {
    **dict.fromkeys({*MEASURES, *LENGTHLESS, *FACTS} - {"harness"}, 0),
    **dict.fromkeys(("perplexity", "sliding_perplexity", "longppl"), 1),
}
"""The lowest value of metrics whose path begins so. The harness has none: its tasks have scales of their own."""
SPREAD = ("perplexity", "sliding_perplexity", "longppl", "position_nats")
"""Metrics that no number bounds above, and whose intervals may reach below that: all others are shares, and theirs end there."""
FEWEST = 5
"""Things to be found at one length, for a share of them to be judged: four of five are the gate's 80 %."""


def lengths_of_the_gate(
    backbone: Any, position: Any, perplexity: Any, passkey: Any, needle: Any, ruler: Any, longeval: Any, gate: Any
) -> Iterator[str]:
    """Every length that a rule asks for is measured; the base's window only where its config is on this machine."""
    measured = {
        "perplexity": perplexity.lengths,
        "passkey": passkey.lengths,
        "needle": needle.lengths,
        "ruler": ruler.lengths,
        "longeval": longeval.lengths,
    }
    window, context = window_of(backbone), position.context
    told = set()
    for rule, path, (measure, _, at, *_) in asked_by(gate):
        lengths = measured.get(MEASURES.get(measure, ""))
        key = f"{MEASURES.get(measure)}.lengths"
        length = {"target": context, "long": context, "window": window, "lowest": window, "short": window}.get(at)
        if at.isdecimal():
            length = int(at)
        inside = at in ("window", "lowest", "short")
        if names_a_file(path, longeval) or lengths is None or length is None or (key, length, inside) in told:
            continue
        told.add((key, length, inside))
        here = f"{key} = {lengths}"
        why = f"which the gate's rule '{rule.name}' asks for"
        least = -(-min(length, context) // 2)
        if inside and not any(least <= n <= length for n in lengths):
            yield f"{here} has none from {least} up to the base's window, {length}, {why}: add {min(length, context)}"
        elif not inside and length not in lengths:
            said = str(length) if at.isdecimal() else f"position.context = {length}"
            yield f"{here} lacks {said}, {why}: set {key}={sorted({*lengths, length})}"


def depths_of_the_gate(passkey: Any, needle: Any, gate: Any) -> Iterator[str]:
    """What a rule asks to be found is not all hidden just before the question."""
    for key, grid in {"passkey": passkey, "needle": needle}.items():
        rules = [rule.name for rule, _, (measure, *_) in asked_by(gate) if measure == key]
        if not rules:
            continue
        asked = f"where the gate's rule '{rules[0]}' is asked"
        if 2 * sum(depth <= 0.5 for depth in grid.depths) < len(grid.depths):
            yield f"{key}.depths = {grid.depths}: at least half must be at most 0.5, {asked}; add 0.0"


def spread_of_the_gate(blocks: Any, perplexity: Any, needle: Any, longppl: Any, gate: Any) -> Iterator[str]:
    """What a rule asks an interval of is measured on more than one document, or haystack: one alone shows no spread."""
    names = [] if blocks.held_out.texts else blocks.held_out.names
    asked: dict[str, str] = {}
    for rule, _, (measure, *_) in asked_by(gate):
        if rule.with_interval:
            asked.setdefault(measure, rule.name)
    of_texts = ("perplexity", "position_nats", "sliding_perplexity", "longppl")
    drawn = {
        f"blocks.held_out.names = {names}": (len(names), of_texts),
        f"perplexity.samples = {perplexity.samples}": (perplexity.samples, ("perplexity", "position_nats")),
        f"longppl.samples = {longppl.samples}": (longppl.samples, ("longppl",)),
        f"needle.samples = {needle.samples}": (needle.samples, ("needle",)),
    }
    for said, (count, measures) in drawn.items():
        name = next((asked[measure] for measure in measures if measure in asked), None)
        if count == 1 and name:
            yield f"{said} shows no spread, and the gate's rule '{name}' asks for an interval: at least 2 do"


def trials_of_the_gate(passkey: Any, needle: Any, ruler: Any, longeval: Any, harness: Any, gate: Any) -> Iterator[str]:
    """What a rule asks to be found or solved at a length is not so by a stroke of luck."""
    limit = harness.limit or FEWEST
    of_tasks = [rule.name for rule, _, (measure, *_) in asked_by(gate) if measure == "harness"]
    if of_tasks and limit < FEWEST:
        yield (
            f"harness.limit = {limit}: so many questions of each task, and at least {FEWEST} say something, where the gate's rule "
            f"'{of_tasks[0]}' is asked; set harness.limit=null"
        )
    asked: dict[tuple[str, str], str] = {}
    for rule, path, (measure, _, at, part, _) in asked_by(gate):
        if not names_a_file(path, longeval) and (at.isdecimal() or at in (*LENGTHS, "effective")):
            single = part if part == INSIDE.get(measure) else ""
            asked.setdefault((MEASURES.get(measure, ""), single), rule.name)
    drawn = {
        "passkey": (passkey, len(passkey.depths), " of passkey.depths"),
        "needle": (needle, len(needle.depths), " of needle.depths"),
        "ruler": (ruler, len(ruler.tasks), " of ruler.tasks"),
        "longeval": (longeval, 1, " task"),
    }
    for (key, single), name in asked.items():
        section, parts, of = drawn.get(key, (None, 0, ""))
        if single:
            parts, of = 1, f" {single}"
        if section and (trials := parts * section.samples) < FEWEST:
            yield (
                f"{key}.samples = {section.samples} at {parts}{of}: {trials} at each length, and at least {FEWEST} say something, "
                f"where the gate's rule '{name}' is asked; set {key}.samples={-(-FEWEST // parts)}"
            )


def gains_of_the_gate(backbone: Any, position: Any, gate: Any) -> Iterator[str]:
    """What training gains in long texts and in short ones is compared where there are both, and where some were read before."""
    window = window_of(backbone)
    for rule in gate.under(position.method).every_rule:
        if rule.ratio_at != "window":
            continue
        if position.method == "none" and window and position.context <= window:
            why = "position.method = none leaves nothing beyond the base's window"
        elif position.method == "linear" and rule.times.split("/")[1] == "linear":
            why = "under untrained linear scaling no length is read well, and training gains as much in short texts"
        else:
            continue
        yield f"{why}, so the gate's rule '{rule.name}' says nothing: name it in gate.not_asked, with why"


def rules_can_hold_and_fail(gate: Any) -> Iterator[str]:
    """No rule holds whatever the scores are, nor does one fail so."""
    for rule in gate.every_rule:
        known = all(path.split("/")[0] in LOWEST for path in rule.paths)
        if known and (why := settled(rule)):
            yield f"the gate's rule '{rule.name}' holds of {why}"


def settled(rule: Any) -> str | None:
    """Why the rule holds of any model, or of none, whatever the scores are; None where they decide."""
    metric, interval = rule.metric, rule.with_interval
    if interval and (bare := next((path for path in rule.paths if has_no_interval(path)), None)):
        return f"no model: {bare} has no interval; leave out with_interval"
    (lowest, highest), (least, most) = span_of(metric, spread=interval), required_by(rule)
    share = interval and highest == 1  # its interval is not of 0 alone, nor of 1
    if rule.upper and highest <= least:
        return f"any model: {metric} is never above {highest}; set at_most lower"
    if rule.upper and (lowest > most or (share and lowest == most)):
        return f"no model: {metric} is {'always above' if share else 'never below'} {lowest}; set at_most higher"
    if not rule.upper and lowest >= most:
        return f"any model: {metric} is never below {lowest}; set at_least higher"
    if not rule.upper and (highest < least or (share and highest == least)):
        return f"no model: {metric} is {'always below' if share else 'never above'} {highest}; set at_least lower"
    neutral = 1 if rule.times else 0
    if metric in (rule.times, rule.plus) and (rule.bound >= neutral if rule.upper else rule.bound <= neutral):
        return f"any model: it compares {metric} with itself; name another"
    return None


def has_no_interval(path: str) -> bool:
    measure, *_, last = path.split("/")
    return measure in FACTS or last in (*ENDS, *COUNTS)


def span_of(path: str, *, spread: bool) -> tuple[float, float]:
    """The lowest and the highest that the metric can be; `spread`: or an end of its interval."""
    measure, *_, last = names = path.removesuffix("/value").split("/")
    if last in COUNTS or names in (["integrity", "window"], ["integrity", "target"]):
        return 0, math.inf
    if measure in SPREAD:
        return (-math.inf if spread or last in ENDS else LOWEST[measure]), math.inf
    return LOWEST[measure], 1


def required_by(rule: Any) -> tuple[float, float]:
    """The lowest and the highest that the rule can ask for."""
    if not (reference := rule.times or rule.plus):
        return rule.bound, rule.bound
    ends = span_of(reference, spread=rule.with_interval)
    asked = (
        [rule.bound * end if rule.bound else 0 for end in ends] if rule.times else [rule.bound + end for end in ends]
    )
    return min(asked), max(asked)


def window_of(backbone: Any) -> int | None:
    """Tokens that the base of a folder reaches; None where that is not known without loading it.

    Raises:
        ValueError: its config is no object of JSON, or says another thing than a number.
    """
    file = Path(os.path.expanduser(backbone.name)) / "config.json"
    if backbone.source != "folder" or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"backbone.name: {file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"backbone.name: {file} is a {type(config).__name__}, and must be an object, {{...}}")
    window = config.get("max_position_embeddings")
    if not isinstance(window, int | None) or isinstance(window, bool):
        raise ValueError(f"backbone.name: {file} says max_position_embeddings = {window!r}, no whole number of tokens")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    match rope:
        case {
            "rope_type": "yarn",
            "factor": int() | float() as factor,
            "original_max_position_embeddings": int() as own,
        } if window and math.isfinite(factor):
            return max(window, round(factor * own))
        case dict() if rope.get("rope_type", rope.get("type", "default")) == "default":
            return window
        case _:
            return None
