"""params.yaml as a whole, before anything is computed: `python -m longlora.check [params.yaml]...` in a project's folder, with
`--each` first for its sections one by one.

Every section that a stage of dvc.yaml takes is made by its own class, and what one section needs of another is there. A stage
checks its own sections too, but only as it begins, which for the last ones is after the training.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any

from longlora.attention.groups import group_size
from longlora.check_gate import (
    depths_of_the_gate,
    gains_of_the_gate,
    lengths_of_the_gate,
    rules_can_hold_and_fail,
    spread_of_the_gate,
    trials_of_the_gate,
    window_of,
)
from longlora.check_paths import (
    LENGTHS,
    UNNAMED,
    facts_of_the_gate,
    models_of_the_gate,
    parts_of_the_gate,
    pickers_of_the_gate,
    questions_of_the_gate,
    scalings,
    scores_of_the_gate,
)
from longlora.data import shares
from longlora.data.texts import ELSEWHERE, below
from longlora.parallel import layout
from longlora.section import Once, Section, nearest, read_params, section_of
from longlora.standin import stand_in

READ = {"text": ("txt", "md"), "jsonl": ("jsonl",), "parquet": ("parquet",)}
"""Suffixes of the files that are read from a folder, by kind of source."""

OWN = ("base", "extended")
"""Labels of the models that every run makes."""

TAKEN = (*OWN, "s2", "full", "untrained", *LENGTHS)
"""What the report and the gate's rules take for one of these, one that was trained a second time, or a length."""


class Evaluate(Section):
    """Labels of the models that are asked, by stage. No stage takes it: the matrices of dvc.yaml are these lists, and a model more
    does not make another measurement of the ones before. Those of rescale, retrain and rivals are asked for perplexity and
    passkeys without being named."""

    perplexity: Annotated[list[str], Once]
    """Perplexity and its bands."""
    passkey: Annotated[list[str], Once]
    """Passkeys."""
    keytokens: Annotated[list[str], Once]
    """The models that pick LongPPL's tokens."""
    longppl: Annotated[list[str], Once]
    """LongPPL, over the tokens that the models of `keytokens` pick."""
    needle: Annotated[list[str], Once]
    """Needles in held-out text."""
    ruler: Annotated[list[str], Once]
    """RULER's tasks."""
    longeval: Annotated[list[str], Once]
    """LongEval's lines and topics."""
    longqa: Annotated[list[str], Once]
    """Questions on long documents."""
    harness: Annotated[list[str], Once]
    """Tasks of lm-evaluation-harness."""


class Rescale(Section):
    """As with `Evaluate`, the matrices of dvc.yaml are this list."""

    methods: Annotated[list[str], Once]
    """Of `position.method`: the base under each of these, untrained, is called by it."""


def sections_of(pipeline: str) -> dict[str, type[Section]]:
    """The classes of all sections that `pipeline`, the text of a dvc.yaml, needs: those of the library's stages that it calls, and
    the lists of its matrices."""
    stages = [
        importlib.import_module(f"longlora.stages.{name}").stage
        for name in sorted(set(re.findall(r"-m longlora\.stages\.(\w+)", pipeline)))
    ]
    arguments = [a for stage in stages for a in inspect.signature(stage, eval_str=True).parameters.values()]
    lists: dict[str, type[Section]] = {"evaluate": Evaluate, "rescale": Rescale}
    own = {name: kind for name, kind in lists.items() if f"${{{name}." in pipeline}
    return own | {a.name: a.annotation for a in arguments if a.annotation is not Path}


def check(params: dict[str, Any], kinds: dict[str, type[Section]], *, together: bool = True) -> list[str]:
    """What is allowed and still worth a word.

    Raises:
        ValueError: one line with all that is wrong, unless every section of `kinds` is in `params` and right, and they fit
            `together`, where that is asked.
    """
    sections, wrong = {}, []
    for name, kind in kinds.items():
        try:
            sections[name] = section_of(kind, params, name)
        except ValueError as error:
            wrong.append(str(error).removeprefix("params: "))
    if wrong := wrong or (list(dict.fromkeys(misfits(sections))) if together else []):  # two paths may lack the same
        raise ValueError("params: " + "; ".join(wrong))
    if not together:
        return []
    return list(noted(**{name: sections[name] for name in NOTED})) if sections.keys() >= NOTED else []


def misfits(sections: dict[str, Any]) -> Iterator[str]:
    """What sections, each right by itself, ask of one another in vain. Where one of them is not there, nothing is asked."""
    for rule in (
        data_is_there,
        context_is_longer,
        training_data,
        groups,
        idle,
        second_training,
        baselines,
        models,
        questions,
        models_of_the_gate,
        lengths_of_the_gate,
        depths_of_the_gate,
        trials_of_the_gate,
        spread_of_the_gate,
        parts_of_the_gate,
        facts_of_the_gate,
        questions_of_the_gate,
        pickers_of_the_gate,
        scores_of_the_gate,
        gains_of_the_gate,
        rules_can_hold_and_fail,
    ):
        if sections.keys() >= (needed := inspect.signature(rule).parameters).keys():
            yield from rule(**{name: sections[name] for name in needed})


def data_is_there(backbone: Any, blocks: Any, pairs: Any) -> Iterator[str]:
    """What is read from a path is there. Where nothing is now, but sources.yaml has its hash, it was there when the run was made:
    its stages may be fetched, which takes no data."""
    file = Path("sources.yaml")
    known = {name for section in (read_params(file) if file.is_file() else {}).values() for name in section or {}}
    texts = {"blocks": blocks, "blocks.held_out.texts": blocks.held_out.texts}
    for key, kind, name in [
        ("backbone.name", backbone.source, backbone.name),
        *((f"{key}.name", each.source, each.name) for key, each in texts.items() if each),
        *((f"pairs.sources.{n}.name", each.kind, each.name) for n, each in enumerate(pairs.sources)),
    ]:
        if kind in ("package", "hub", "gguf"):
            continue
        place = Path(os.path.expanduser(name))
        if not place.exists():
            if name in known:
                continue
            hint = "" if place.is_absolute() else f"; {ELSEWHERE}"
            yield f"{key} = '{name}': nothing is there{hint}"
            continue
        wanted = READ.get(kind, ())
        if wanted and place.is_dir() and not any(below(place, suffix=suffix) for suffix in wanted):
            yield f"{key} = '{name}': the folder holds no {' or '.join(f'.{suffix}' for suffix in wanted)} file"


def context_is_longer(backbone: Any, position: Any) -> Iterator[str]:
    window = window_of(backbone)
    if window and position.method != "none" and position.context <= window:
        yield f"position.context = {position.context} must be above the {window} that the base reaches, or method: none"


def training_data(blocks: Any, pairs: Any, position: Any, fit: Any) -> Iterator[str]:
    yield from blocks.recall.misfits(position.context)
    yield from shares.misfits(
        pairs_share=fit.pairs_share,
        recall_share=fit.recall_share,
        pairs=bool(pairs.sources or pairs.casebook),
        exercises=blocks.recall.count > 0,
    )
    yield from layout.batch_misfits(fit.global_batch_size, micro_batch_size=fit.micro_batch_size, replicas=1)


def groups(position: Any, attention: Any) -> Iterator[str]:
    if attention.pattern == "s2" and attention.shift == "roll":
        yield from layout.roll_misfits(position.context, group_size=group_size(position.context, attention.group_ratio))


def idle(fit: Any) -> Iterator[str]:
    """What would be asked for, and do nothing."""
    if fit.activation_offloading and not fit.gradient_checkpointing:
        yield (
            "fit.activation_offloading lays off what gradient checkpointing keeps: set fit.gradient_checkpointing=true, or "
            "fit.activation_offloading=false"
        )


def noted(attention: Any, adapter: Any, fit: Any) -> Iterator[str]:
    """What does nothing either, and is no mistake: in trials of a few steps, or in a sweep over what is trained."""
    if fit.warmup_steps >= fit.steps:
        yield f"fit.warmup_steps = {fit.warmup_steps} of fit.steps = {fit.steps}: fit.learning_rate is never reached"
    last, steps = attention.full_attention_last, fit.steps
    if attention.pattern == "s2" and last and not round(steps * last):
        yield f"attention.full_attention_last = {last} of fit.steps = {steps} is no step: all are under S2-Attn"
    if adapter.method == "full" and fit.loraplus_lr_ratio != 1:
        yield f"fit.loraplus_lr_ratio = {fit.loraplus_lr_ratio:g} is for low-rank matrices, and adapter.method = full has none"


NOTED = inspect.signature(noted).parameters.keys()
"""The sections that `noted` looks at."""


def second_training(attention: Any, retrain: Any) -> Iterator[str]:
    yield from retrain.misfits(attention)


def baselines(position: Any, rescale: Any, rivals: Any) -> Iterator[str]:
    known = scalings(position)
    for method in rescale.methods:
        if method not in known:
            yield f"rescale.methods names '{method}', and there is no such scaling{nearest(method, known)}"
    for name in rivals.models:
        if name in known:  # the gate would take it for the baseline
            yield f"rivals.models names '{name}', which is the base under that scaling: give the folder another name"
        if name in TAKEN:
            yield f"rivals.models names '{name}', which is a model or a length of the pipeline's own: give the folder another name"


def models(evaluate: Any, rescale: Any, retrain: Any, rivals: Any) -> Iterator[str]:
    others = [*rescale.methods, *retrain.patterns, *rivals.models]
    for measure, labels in evaluate:
        for label in labels:
            if measure in UNNAMED and label in others:
                yield f"evaluate.{measure} names '{label}', which is asked without that: leave it out"
            elif label not in (known := [*OWN, *others]):
                yield f"evaluate.{measure} names '{label}', and there is no such model{nearest(label, known)}"


def questions(evaluate: Any, blocks: Any, pairs: Any, longeval: Any, longqa: Any, harness: Any) -> Iterator[str]:
    if evaluate.longeval and not ((longeval.tasks and longeval.lengths) or longeval.cases):
        yield "longeval has neither tasks with lengths nor cases: name some, or leave evaluate.longeval empty"
    if evaluate.longeval:
        yield from longeval.misfits()
    if evaluate.longqa and not (longqa.cases or (longqa.held_out and pairs.casebook)):
        yield (
            "longqa.cases names no file, and there are no held-out cases (longqa.held_out and a pairs.casebook): name one, or "
            "leave evaluate.longqa empty"
        )
    if evaluate.longqa:
        yield from longqa.misfits()
    if evaluate.longqa and longqa.held_out and pairs.casebook and blocks.held_out.texts:
        yield (
            "longqa.held_out asks about documents held out of the training's own texts, and blocks.held_out.texts is another "
            "source: set longqa.held_out=false, and name files in longqa.cases"
        )
    if evaluate.longppl and not evaluate.keytokens:
        yield "evaluate.longppl names models, and evaluate.keytokens none that picks the tokens: name one, such as base"
    if evaluate.longqa and (pairs.sources or pairs.casebook):
        yield from unchecked(longqa.cases, pairs.contamination.cases)
    if evaluate.harness and not harness.tasks:
        yield "harness.tasks names no task: name one, or leave evaluate.harness empty"
    # With a launcher of its own, another environment may compute it.
    if (
        evaluate.harness
        and not os.environ.get("LONGLORA_EVALUATION_LAUNCHER")
        and PathFinder.find_spec("lm_eval") is None
    ):
        yield "evaluate.harness needs lm-evaluation-harness: pip install 'longlora-pipeline[eval]', or leave it empty"


def unchecked(cases: list[str], checked: str | None) -> Iterator[str]:
    """Files that are asked, and that pairs are not held against: they might be trained on."""
    from longlora.data.instructions import SUFFIXES  # behind `stand_in`: it takes pyarrow

    held = None if checked is None else Path(checked).resolve()
    for name in cases:
        file = Path(name).resolve()
        read = Path(name) if held == file else file  # a folder's files are found where they lie
        if read.suffix.lower() not in SUFFIXES:  # in a folder it would be passed over
            yield (
                f"longqa.cases {name} is asked, and pairs are held against {', '.join(SUFFIXES)} files only, so they could "
                "hold what is asked: rename it to .jsonl"
            )
        elif held not in (file, *file.parents):
            where = name if len(cases) == 1 else "a folder that holds all of longqa.cases"
            yield (
                f"pairs.contamination.cases = {'null' if checked is None else checked} leaves out longqa.cases {name}, so pairs "
                f"could hold what is asked: set it to {where}"
            )


EACH = "--each"


def main(arguments: list[str]) -> int:
    """Check each of the params files; the first that is wrong ends it, with one line and status 2. Prints a note once."""
    files = [each for each in arguments if each != EACH]
    stand_in()
    notes: list[str] = []
    kinds = sections_of(Path("dvc.yaml").read_text())
    for file in files or ["params.yaml"]:
        try:
            notes += check(read_params(Path(file)), kinds, together=EACH not in arguments)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for note in dict.fromkeys(notes):
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
