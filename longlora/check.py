"""params.yaml as a whole, before anything is computed: `python -m longlora.check [params.yaml]...` in a project's folder.

Every section that a stage of dvc.yaml takes is made by its own class, and what one section needs of another is there. A stage
checks its own sections too, but only as it begins, which for the last ones is after the training.
"""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from longlora.section import Section, read_params, section_of
from longlora.standin import stand_in

MEASURES = {
    "perplexity": "perplexity",
    "sliding_perplexity": "perplexity",
    "passkey": "passkey",
    "ruler": "ruler",
    "longeval_lines": "longeval",
    "longeval_topics": "longeval",
}
"""First words of the metrics that are by length, and the section that says at which lengths."""


def sections_of_stages(pipeline: str) -> dict[str, type[Section]]:
    """The classes of all sections that the library's stages take which `pipeline`, the text of a dvc.yaml, calls."""
    stages = [
        importlib.import_module(f"longlora.stages.{name}").stage
        for name in sorted(set(re.findall(r"-m longlora\.stages\.(\w+)", pipeline)))
    ]
    arguments = [a for stage in stages for a in inspect.signature(stage, eval_str=True).parameters.values()]
    return {a.name: a.annotation for a in arguments if a.annotation is not Path}


def check(params: dict[str, Any], kinds: dict[str, type[Section]]) -> None:
    """Raises ValueError, one line with all that is wrong, unless every section of `kinds` is in `params` and right, and they fit
    together."""
    sections, wrong = {}, []
    for name, kind in kinds.items():
        try:
            sections[name] = section_of(kind, params, name)
        except ValueError as error:
            wrong.append(str(error).removeprefix("params: "))
    if wrong := wrong or list(misfits(sections)):
        raise ValueError("params: " + "; ".join(wrong))


def misfits(sections: dict[str, Any]) -> Iterator[str]:
    """What sections, each right by itself, ask of one another in vain. Where one of them is not there, nothing is asked."""
    for rule in (training_data, second_training, questions, lengths_of_the_gate):
        if sections.keys() >= (needed := inspect.signature(rule).parameters).keys():
            yield from rule(**{name: sections[name] for name in needed})


def training_data(blocks: Any, pairs: Any, position: Any, fit: Any) -> Iterator[str]:
    recall, context = blocks.recall, position.context
    if recall.count and recall.reach > context:
        yield f"blocks.recall.reach = {recall.reach} must be at most position.context = {context}"
    if fit.recall_share and not recall.count:
        yield f"fit.recall_share = {fit.recall_share} needs exercises, and blocks.recall.count is 0"
    if fit.pairs_share and not (pairs.sources or pairs.casebook):
        yield f"fit.pairs_share = {fit.pairs_share} needs pairs: name pairs.sources or a pairs.casebook, or set it to 0"
    if fit.pairs_share + fit.recall_share > 1:
        yield f"fit.pairs_share + fit.recall_share = {fit.pairs_share} + {fit.recall_share}: must be at most 1"
    if fit.global_batch_size % fit.micro_batch_size:
        yield f"fit.global_batch_size = {fit.global_batch_size} must be a multiple of micro_batch_size = {fit.micro_batch_size}"


def second_training(attention: Any, retrain: Any) -> Iterator[str]:
    if attention.pattern in retrain.patterns:
        other = "s2" if attention.pattern == "full" else "full"
        yield f"retrain.patterns names {attention.pattern}, which is attention.pattern already: name {other}, or none"


def questions(pairs: Any, longeval: Any, longqa: Any, harness: Any) -> Iterator[str]:
    if longeval.models and not ((longeval.tasks and longeval.lengths) or longeval.cases):
        yield "longeval has neither tasks with lengths nor cases: name some, or leave longeval.models empty"
    if longqa.models and not (longqa.cases or (longqa.held_out and pairs.casebook)):
        yield (
            "longqa.cases names no file, and there are no held-out cases (longqa.held_out and a pairs.casebook): name one, or "
            "leave longqa.models empty"
        )
    if harness.models and not harness.tasks:
        yield "harness.tasks names no task: name one, or leave harness.models empty"
    # With a launcher of its own, another environment may compute it.
    if (
        harness.models
        and not os.environ.get("LONGLORA_EVALUATION_LAUNCHER")
        and PathFinder.find_spec("lm_eval") is None
    ):
        yield "harness.models needs lm-evaluation-harness: pip install 'longlora-pipeline[eval]', or leave it empty"


def lengths_of_the_gate(
    backbone: Any, position: Any, perplexity: Any, passkey: Any, ruler: Any, longeval: Any, gate: Any
) -> Iterator[str]:
    """Every length that a rule asks for is measured; the base's window only where its config is on this machine."""
    measured = {
        "perplexity": perplexity.lengths,
        "passkey": passkey.lengths,
        "ruler": ruler.lengths,
        "longeval": longeval.lengths,
    }
    window = window_of(backbone)
    told = set()
    for rule in gate.rules:
        for path in filter(None, (rule.metric, rule.times, rule.plus)):
            measure, *_, at = path.split("/")
            lengths = measured.get(MEASURES.get(measure, ""), [])
            key = f"{MEASURES.get(measure)}.lengths"
            length = (
                position.context
                if at == "target"
                else window
                if at == "window"
                else int(at)
                if at.isdecimal()
                else None
            )
            if not lengths or length is None or (key, at) in told:
                continue
            told.add((key, at))
            here = f"{key} = {lengths}"
            why = f"which the gate's rule '{rule.name}' asks for"
            if at == "window" and min(lengths) > length:
                yield f"{here} has none up to the base's window, {length}, {why}: add {length}"
            elif at != "window" and length not in lengths:
                said = f"position.context = {length}" if at == "target" else str(length)
                yield f"{here} lacks {said}, {why}: set {key}={sorted({*lengths, length})}"


def window_of(backbone: Any) -> int | None:
    """Tokens that the base of a folder reaches; None where that is not known without loading it."""
    file = Path(backbone.name).expanduser() / "config.json"
    if backbone.source != "folder" or not file.is_file():
        return None
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return config.get("max_position_embeddings") if plain else None


def main(files: list[str]) -> int:
    """Check each of the params files; the first that is wrong ends it, with one line and status 2."""
    stand_in()
    kinds = sections_of_stages(Path("dvc.yaml").read_text())
    for file in files or ["params.yaml"]:
        try:
            check(read_params(Path(file)), kinds)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
