"""Whether the paths that the gate's rules name lead to a score: of a model, length, depth, task, fact or evaluator that the run
measures. A path that leads to none refuses a model only after the training. `longlora.check` asks.
"""

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
"""The same for metrics whose lengths, if they have any, stand in no section."""
LENGTHS = ("target", "window", "lowest", "short", "long")
"""Names that stand for lengths."""
INSIDE = {"passkey": "depth", "needle": "depth", "ruler": "task"}
"""What a score at one length is broken down by."""
BESIDE = {
    "perplexity": ("places", "documents", "documents_too_short"),
    "sliding_perplexity": ("stride",),
    "ruler": ("effective",),
    "longqa": ("cases", "cut"),
}
"""Names that stand where others have a length, and are no score: how many were scored, or up to where."""
PARTED = ("exact", "f1", "evidence", "evidence_floor")
"""Scores of questions that are also given by length and depth (evaluation/breakdown.py, which takes NumPy)."""
QUARTERS = ("0.25", "0.50", "0.75", "1.00")
"""Depths of questions."""
KNOWN = {
    "integrity": ("window", "target", "whole", "sealed", "context", "rope", "tokenizer", "finite", "trained", "logits"),
    "licence": ("base", "texts", "pairs"),
    "longqa": (*PARTED, "rouge_l", *BESIDE["longqa"]),
}
"""All names that these measures have, whatever their settings: facts about the run, or what stands behind a model's label."""
FACTS = ("integrity", "licence", "numbers")
ENDS = ("value", "low", "high")
COUNTS = ("trials", "tokens", "threshold", *chain.from_iterable(BESIDE.values()))
"""Numbers that stand beside scores and are none. Like the ENDS, they have no interval of their own."""
COUNTED = {
    **dict.fromkeys(("perplexity", "sliding_perplexity", "longppl"), ("tokens",)),
    **dict.fromkeys(("longeval_lines", "longeval_topics"), ("trials", "tokens")),
    "position_nats": (),
}
"""Which of the COUNTS stand beside scores of these measures; beside those of others, `trials` does."""


def asked_by(gate: Any) -> Iterator[tuple[Any, str, list[str]]]:
    """Each path of each rule: the rule, the path, and its first five names (measure, model, length, ...), '' where it has fewer."""
    for rule in gate.every_rule:
        for path in rule.paths:
            yield rule, path, [*path.split("/"), "", "", "", ""][:5]


def models_of_the_gate(
    position: Any, evaluate: Any, rescale: Any, retrain: Any, rivals: Any, gate: Any
) -> Iterator[str]:
    others, told = [*rescale.methods, *retrain.patterns, *rivals.models], set()
    for rule, _, (measure, label, *_) in asked_by(gate.under(position.method)):
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


def parts_of_the_gate(perplexity: Any, passkey: Any, needle: Any, gate: Any) -> Iterator[str]:
    """What is measured only where it is switched on, or at certain depths, is measured where a rule asks for it."""
    switches = {"sliding_perplexity": "sliding", "position_nats": "bands"}
    grids = {"passkey": passkey, "needle": needle}
    for rule, path, (measure, _, at, part, depth) in asked_by(gate):
        if (switch := switches.get(measure)) and getattr(perplexity, switch) is None:
            yield f"perplexity.{switch} = null, and the gate's rule '{rule.name}' asks for {measure}: set it"
        elif measure == "position_nats" and at.isdecimal():
            longest = max(perplexity.lengths)
            band = longest // perplexity.bands
            if int(at) not in range(band, longest + 1, band):
                yield f"the gate's rule '{rule.name}' asks for {path}, and a band ends every {band} tokens up to {longest}"
        if measure in grids and part == "depth":
            depths = [f"{each:.2f}" for each in grids[measure].depths]
            if depth not in depths:
                yield f"the gate's rule '{rule.name}' asks for {path}, and the depths of {measure} are {', '.join(depths)}"


def names_a_file(path: str, longeval: Any) -> bool:
    """Whether the metric is of LongEval's cases in a file, whose name stands where others have a length."""
    measure, _, at, *_ = [*path.split("/"), "", ""]
    return MEASURES.get(measure) == "longeval" and at in {Path(file).stem for file in longeval.cases}


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
    for rule, path, (measure, _, at, part, depth) in asked_by(gate):
        if not (measure in LENGTHLESS and measure.startswith("longqa") and at):
            continue
        asks = f"the gate's rule '{rule.name}' asks for {path}"
        if measure == "longqa":
            if at not in KNOWN[measure]:
                yield f"{asks}{nearest(at, [*KNOWN[measure]])}"
        elif measure == "longqa_depth":
            if at not in QUARTERS or part not in PARTED:
                yield f"{asks}, and behind the model stand one of {', '.join(QUARTERS)} and one of {', '.join(PARTED)}"
        elif not is_bucket(str(position.context) if at in ("target", "long") else at, longest=longqa.length):
            yield f"{asks}, and lengths of documents are powers of two, and longqa.length = {longqa.length}"
        elif part == "depth" and depth not in QUARTERS:
            yield f"{asks}, and depths of questions are {', '.join(QUARTERS)}"


def is_bucket(length: str, *, longest: int) -> bool:
    """Whether documents are counted under `length`, which may also be a name that stands for one."""
    return length in LENGTHS or (length.isdecimal() and (int(length) == longest or int(length).bit_count() == 1))


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
    for rule, path, (measure, _, at, part, name) in asked_by(gate):
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


def scalings(position: Any) -> list[str]:
    """All that `position.method` may be, but none at all."""
    return [method for method in get_args(type(position).model_fields["method"].annotation) if method != "none"]
