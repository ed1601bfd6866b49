"""What the gate's rules ask, held against the other sections: a rule that nothing can answer, or that holds of any model, refuses a
model, or lets one through, only after the training. The rules of `longlora.check` that are about the gate.
"""

import json
import math
import os
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from longlora.section import nearest

MEASURES = {
    "perplexity": "perplexity",
    "sliding_perplexity": "perplexity",
    "passkey": "passkey",
    "needle": "needle",
    "ruler": "ruler",
    "longeval_lines": "longeval",
    "longeval_topics": "longeval",
}
"""First words of the metrics that are by length, and the section that says at which lengths."""
UNNAMED = ("perplexity", "passkey")
"""Measures that the models of rescale, retrain and rivals are asked for without being named."""
LENGTHLESS = {"longppl": "longppl", "harness": "harness", "position_nats": "perplexity"} | {
    f"longqa{part}": "longqa" for part in ("", "_exact", "_f1", "_evidence", "_evidence_floor", "_depth")
}
"""The same of metrics whose lengths no section says, if they have some."""

LENGTHS = ("target", "window", "lowest", "short", "long")
"""Names that stand for lengths."""
INSIDE = {"passkey": "depth", "needle": "depth", "ruler": "task"}
"""What a score at one length is also told by."""
BESIDE = {
    "perplexity": ("places", "documents", "documents_too_short"),
    "sliding_perplexity": ("stride",),
    "ruler": ("effective",),
    "longqa": ("cases", "cut"),
}
"""What stands where others have a length, or what was scored, and says how many, or up to where."""
PARTED = ("exact", "f1", "evidence", "evidence_floor")
"""Scores of questions that are also told by length and depth."""
QUARTERS = ("0.25", "0.50", "0.75", "1.00")
"""Depths of questions."""
KNOWN = {
    "integrity": ("window", "target", "whole", "sealed", "context", "rope", "tokenizer", "finite", "trained", "logits"),
    "licence": ("base", "texts", "pairs"),
    "longqa": (*PARTED, "rouge_l", *BESIDE["longqa"]),
}
"""All that these measures say, whatever they are told to: of the run, or behind a model."""

FACTS = ("integrity", "licence", "numbers")
LOWEST = {
    **dict.fromkeys({*MEASURES, *LENGTHLESS, *FACTS} - {"harness"}, 0),
    **dict.fromkeys(("perplexity", "sliding_perplexity", "longppl"), 1),
}
"""What metrics that begin so are never below; those of the harness are its tasks' own."""

SPREAD = ("perplexity", "sliding_perplexity", "longppl", "position_nats")
"""Metrics that no number bounds above, and whose intervals may reach below that: all others are shares, and theirs end there."""

ENDS = ("value", "low", "high")
COUNTS = ("trials", "tokens", "threshold", *chain.from_iterable(BESIDE.values()))
"""What stands beside scores, and is none. Neither it nor an end has an interval of its own."""
COUNTED = {
    **dict.fromkeys(("perplexity", "sliding_perplexity", "longppl"), ("tokens",)),
    **dict.fromkeys(("longeval_lines", "longeval_topics"), ("trials", "tokens")),
    "position_nats": (),
}
"""Of COUNTS, what a score of these has; those of other measures have trials."""

FEWEST = 5
"""Things to be found at one length, for a share of them to be judged: four of five are the gate's 80 %."""


def models_of_the_gate(
    position: Any, evaluate: Any, rescale: Any, retrain: Any, rivals: Any, gate: Any
) -> Iterator[str]:
    others, told = [*rescale.methods, *retrain.patterns, *rivals.models], set()
    for rule in gate.under(position.method).every_rule:
        for path in rule.paths:
            measure, label, *_ = [*path.split("/"), ""]
            stage = (MEASURES | LENGTHLESS).get(measure)
            if stage is None:
                continue
            asked = getattr(evaluate, stage)
            if label in asked or (stage in UNNAMED and label in others):
                continue
            rescaled = stage in UNNAMED and label in scalings(position)
            here = f"rescale.methods = {rescale.methods}" if rescaled else f"evaluate.{stage} = {asked}"
            if (here, label) not in told:
                told.add((here, label))
                yield f"{here} lacks '{label}', which the gate's rule '{rule.name}' asks for: add it"


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
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, _, at, *_ = [*path.split("/"), "", ""]
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
        rules = [rule.name for rule in gate.every_rule if any(path.split("/")[0] == key for path in rule.paths)]
        if not rules:
            continue
        asked = f"where the gate's rule '{rules[0]}' is asked"
        if 2 * sum(depth <= 0.5 for depth in grid.depths) < len(grid.depths):
            yield f"{key}.depths = {grid.depths}: at least half must be at most 0.5, {asked}; add 0.0"


def spread_of_the_gate(blocks: Any, perplexity: Any, needle: Any, longppl: Any, gate: Any) -> Iterator[str]:
    """What a rule asks an interval of is measured on more than one document, or haystack: one alone shows no spread."""
    names = [] if blocks.held_out.texts else blocks.held_out.names
    asked: dict[str, str] = {}
    for rule in gate.every_rule:
        for path in rule.paths if rule.with_interval else ():
            asked.setdefault(path.split("/")[0], rule.name)
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
    of_tasks = [rule.name for rule in gate.every_rule if any(path.startswith("harness/") for path in rule.paths)]
    if of_tasks and limit < FEWEST:
        yield (
            f"harness.limit = {limit}: so many questions of each task, and at least {FEWEST} say something, where the gate's rule "
            f"'{of_tasks[0]}' is asked; set harness.limit=null"
        )
    asked: dict[tuple[str, str], str] = {}
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, _, at, part, *_ = [*path.split("/"), "", "", ""]
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


def names_a_file(path: str, longeval: Any) -> bool:
    """Whether the metric is of LongEval's cases in a file, whose name stands where others have a length."""
    measure, _, at, *_ = [*path.split("/"), "", ""]
    return MEASURES.get(measure) == "longeval" and at in {Path(file).stem for file in longeval.cases}


def parts_of_the_gate(perplexity: Any, passkey: Any, needle: Any, gate: Any) -> Iterator[str]:
    """What is measured only where it is switched on, or at certain depths, is measured where a rule asks for it."""
    switches = {"sliding_perplexity": "sliding", "position_nats": "bands"}
    grids = {"passkey": passkey, "needle": needle}
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, *_ = names = path.split("/")
            if (switch := switches.get(measure)) and getattr(perplexity, switch) is None:
                yield f"perplexity.{switch} = null, and the gate's rule '{rule.name}' asks for {measure}: set it"
            elif measure == "position_nats" and (at := "".join(names[2:3])).isdecimal():
                longest = max(perplexity.lengths)
                band = longest // perplexity.bands
                if int(at) not in range(band, longest + 1, band):
                    yield f"the gate's rule '{rule.name}' asks for {path}, and a band ends every {band} tokens up to {longest}"
            if measure in grids and names[3:4] == ["depth"]:
                depths = [f"{depth:.2f}" for depth in grids[measure].depths]
                if "".join(names[4:5]) not in depths:
                    yield f"the gate's rule '{rule.name}' asks for {path}, and the depths of {measure} are {', '.join(depths)}"


def facts_of_the_gate(
    position: Any, evaluate: Any, rescale: Any, retrain: Any, rivals: Any, gate: Any
) -> Iterator[str]:
    """What a rule asks of the run, or of all scores of a model, is known of it."""
    asked = [label for measure, labels in evaluate if measure != "keytokens" for label in labels]
    models = [*dict.fromkeys([*asked, *rescale.methods, *retrain.patterns, *rivals.models])]
    known = {**KNOWN, "numbers": models}
    for rule, own in under_the_method(position, gate):
        for path in rule.paths:
            measure, name, *_ = [*path.split("/"), ""]
            # a measure of the user's own may be of a model that is not known here
            other = measure == "numbers" and name and not get_close_matches(name, {*models, *scalings(position)})
            if measure in FACTS and name not in known[measure] and not other:
                yield f"the gate's rule '{rule.name}' asks for {own[path]}{nearest(name, [*known[measure]])}"


def under_the_method(position: Any, gate: Any) -> Iterator[tuple[Any, dict[str, str]]]:
    """Each rule under `position.method`, and its paths: as they are written, by what they are then."""
    for rule, written in zip(gate.under(position.method).every_rule, gate.every_rule, strict=True):
        yield rule, dict(zip(rule.paths, written.paths, strict=True))


def questions_of_the_gate(position: Any, longqa: Any, gate: Any) -> Iterator[str]:
    """What a rule asks of answers is among their scores, and a bucket that there is."""
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, _, at, part, depth, *_ = [*path.split("/"), "", "", "", ""]
            asks = f"the gate's rule '{rule.name}' asks for {path}"
            length = str(position.context) if at in ("target", "long") else at
            if measure == "longqa" and at and at not in KNOWN[measure]:
                yield f"{asks}{nearest(at, [*KNOWN[measure]])}"
            elif measure == "longqa_depth" and at and (at not in QUARTERS or part not in PARTED):
                yield f"{asks}, and behind the model stand one of {', '.join(QUARTERS)} and one of {', '.join(PARTED)}"
            elif measure not in LENGTHLESS or not measure.startswith("longqa_") or measure == "longqa_depth" or not at:
                continue
            elif length not in LENGTHS and not is_bucket(length, longest=longqa.length):
                yield f"{asks}, and lengths of documents are powers of two, and longqa.length = {longqa.length}"
            elif part == "depth" and depth not in QUARTERS:
                yield f"{asks}, and depths of questions are {', '.join(QUARTERS)}"


def is_bucket(length: str, *, longest: int) -> bool:
    return length.isdecimal() and (int(length) == longest or int(length).bit_count() == 1)


def pickers_of_the_gate(position: Any, gate: Any) -> Iterator[str]:
    """LongPPL is compared over the same tokens, and no model gains by those that it picked: its lucky guesses are among them."""
    for rule, own in under_the_method(position, gate):
        pickers = {path: name for path in rule.paths if (name := picker_of(path))}
        gains = rule.metric if rule.upper else rule.times or rule.plus or ""
        if len({*pickers.values()}) > 1:
            asked = " and ".join(own[path] for path in pickers)
            yield f"the gate's rule '{rule.name}' asks for {asked}, over other tokens: name one evaluator"
        elif gains in pickers and gains.split("/")[1] == pickers[gains]:
            yield (
                f"the gate's rule '{rule.name}' asks for {own[gains]}, over tokens that the model picked itself, which favours "
                "it: name another evaluator"
            )


def picker_of(path: str) -> str:
    """Who picked the tokens of a LongPPL; '' of other metrics."""
    measure, _, name, *_ = [*path.split("/"), "", ""]
    return name if measure == "longppl" else ""


def scores_of_the_gate(evaluate: Any, ruler: Any, longeval: Any, gate: Any) -> Iterator[str]:
    """The path of a measure that is known leads to a score of it."""
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, _, at, part, name, *_ = [*path.split("/"), "", "", "", ""]
            asks = f"the gate's rule '{rule.name}' asks for {path}, and"
            task = measure.removeprefix("longeval_")
            is_length = at.isdecimal() or at in LENGTHS
            known = names_behind(measure, at)
            if measure == "longppl" and at not in evaluate.keytokens:
                yield f"{asks} behind the model stands who picked the tokens, of evaluate.keytokens = {evaluate.keytokens}"
            elif names_a_file(path, longeval):
                continue
            elif task != measure and is_length and task not in longeval.tasks:
                yield f"longeval.tasks = {longeval.tasks} lacks '{task}', which the gate's rule '{rule.name}' asks for: add it"
            elif measure in {*MEASURES, "position_nats"} and not is_length and at not in BESIDE.get(measure, ()):
                yield f"{asks} behind the model stands a length: a number, {', '.join(LENGTHS)}"
            elif measure in LENGTHLESS and not at:
                scored = {"longqa": "what was scored", "longqa_depth": "a depth", "harness": "a task"}
                yield f"{asks} behind the model stands {scored.get(measure, 'a length')}"
            elif measure in INSIDE and is_length and part not in ("", INSIDE[measure], *known):
                yield f"{asks} behind the length stands {INSIDE[measure]}, or nothing"
            elif measure == "ruler" and part == "task" and name not in ruler.tasks:
                yield f"{asks} ruler.tasks are {', '.join(ruler.tasks)}"
            elif len(rest := behind_the_score(path)) > 1 or not {*rest} <= {*known}:
                or_one = f", or one of {', '.join(known)}" if known else ""
                yield f"{asks} behind {path.removesuffix('/' + '/'.join(rest))} stands nothing{or_one}"


def names_behind(measure: str, at: str) -> tuple[str, ...]:
    """Names that lead on from a score of `measure`, or from what stands `at` the place of a length; a count has none."""
    if at in BESIDE.get(measure, ()):
        return ("value", "threshold") if at == "effective" else ()
    return ("value",) if measure in FACTS else (*ENDS, *COUNTED.get(measure, ("trials",)))


def behind_the_score(path: str) -> list[str]:
    """The names of a path that lead beyond a score; none for a measure that is not known, or the harness's, which has its own."""
    measure, *names = path.split("/")
    if measure == "harness" or measure not in (*MEASURES, *LENGTHLESS, *FACTS):
        return []
    inside = "depth" if measure.startswith("longqa_") else INSIDE.get(measure)
    parted = names[2:3] == [inside]
    return names[1 if measure in FACTS else 3 if measure == "longqa_depth" else 4 if parted else 2 :]


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


def scalings(position: Any) -> list[str]:
    """All that `position.method` may be, but none at all."""
    return [method for method in get_args(type(position).model_fields["method"].annotation) if method != "none"]


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
