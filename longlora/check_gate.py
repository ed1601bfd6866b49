"""What the gate's rules ask, held against the other sections: a rule that nothing can answer, or that holds of any model, refuses a
model, or lets one through, only after the training. The rules of `longlora.check` that are about the gate.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

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
LENGTHLESS = {"longppl": "longppl", "harness": "harness"} | {
    f"longqa{part}": "longqa" for part in ("", "_exact", "_f1", "_evidence", "_evidence_floor", "_depth")
}
"""The same of metrics whose lengths no section says, if they have some."""

LOWEST = {
    **dict.fromkeys({*MEASURES, *LENGTHLESS, "position_nats", "integrity", "licence", "numbers"} - {"harness"}, 0),
    **dict.fromkeys(("perplexity", "sliding_perplexity", "longppl"), 1),
}
"""What metrics that begin so are never below; those of the harness are its tasks' own."""

SPREAD = ("perplexity", "sliding_perplexity", "longppl", "position_nats")
"""Metrics whose intervals may reach below that: those of shares end there."""

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
            lengths = measured.get(MEASURES.get(measure, ""), [])
            key = f"{MEASURES.get(measure)}.lengths"
            length = {"target": context, "long": context, "window": window, "lowest": window, "short": window}.get(at)
            if at.isdecimal():
                length = int(at)
            inside = at in ("window", "lowest", "short")
            if not lengths or length is None or (key, length, inside) in told:
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
    """What a rule asks to be found is not all hidden just before the question, nor found by a stroke of luck."""
    for key, grid in {"passkey": passkey, "needle": needle}.items():
        rules = [rule.name for rule in gate.every_rule if any(path.split("/")[0] == key for path in rule.paths)]
        if not rules:
            continue
        asked = f"where the gate's rule '{rules[0]}' is asked"
        if 2 * sum(depth <= 0.5 for depth in grid.depths) < len(grid.depths):
            yield f"{key}.depths = {grid.depths}: at least half must be at most 0.5, {asked}; add 0.0"
        if (trials := len(grid.depths) * grid.samples) < FEWEST:
            yield (
                f"{key}.samples = {grid.samples} at {len(grid.depths)} of {key}.depths: {trials} at each length, and at least "
                f"{FEWEST} say something, {asked}; set {key}.samples={-(-FEWEST // len(grid.depths))}"
            )


def parts_of_the_gate(perplexity: Any, passkey: Any, needle: Any, gate: Any) -> Iterator[str]:
    """What is measured only where it is switched on, or at certain depths, is measured where a rule asks for it."""
    switches = {"sliding_perplexity": "sliding", "position_nats": "bands"}
    grids = {"passkey": passkey, "needle": needle}
    for rule in gate.every_rule:
        for path in rule.paths:
            measure, *_ = names = path.split("/")
            if (switch := switches.get(measure)) and getattr(perplexity, switch) is None:
                yield f"perplexity.{switch} = null, and the gate's rule '{rule.name}' asks for {measure}: set it"
            if measure in grids and names[3:4] == ["depth"]:
                depths = [f"{depth:.2f}" for depth in grids[measure].depths]
                if "".join(names[4:5]) not in depths:
                    yield f"the gate's rule '{rule.name}' asks for {path}, and the depths of {measure} are {', '.join(depths)}"


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


def rules_can_fail(gate: Any) -> Iterator[str]:
    """No rule holds whatever the scores are."""
    for rule in gate.every_rule:
        measure, *_, last = rule.metric.split("/")
        known = all(path.split("/")[0] in LOWEST for path in rule.paths)
        if not known or last in ("low", "high"):
            continue
        lowest = 0 if rule.times else LOWEST[measure]  # what is multiplied by nothing, or by less
        spread = rule.with_interval and measure in SPREAD
        if not rule.upper and not rule.plus and rule.bound <= lowest and not spread:
            yield f"the gate's rule '{rule.name}' holds of any model: {rule.metric} is never below {lowest}; set at_least higher"
        elif rule.metric in (rule.times, rule.plus):
            neutral = 1 if rule.times else 0
            if rule.bound >= neutral if rule.upper else rule.bound <= neutral:
                yield f"the gate's rule '{rule.name}' holds of any model: it compares {rule.metric} with itself; name another"


def scalings(position: Any) -> list[str]:
    """All that `position.method` may be, but none at all."""
    return [method for method in get_args(type(position).model_fields["method"].annotation) if method != "none"]


def window_of(backbone: Any) -> int | None:
    """Tokens that the base of a folder reaches; None where that is not known without loading it."""
    file = Path(backbone.name).expanduser() / "config.json"
    if backbone.source != "folder" or not file.is_file():
        return None
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return config.get("max_position_embeddings") if plain else None
