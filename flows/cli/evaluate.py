"""Measures outside of a run, for the command line: the library's own, on any model folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flows.cli.options import state_below
from longlora.evaluation import harness, longeval
from longlora.evaluation.answer import keeping
from longlora.model.load import open_model, open_tokenizer
from longlora.model.seal import sha256
from longlora.parallel.sharding import put
from tasks.locks import pin

MODEL = "model"
"""Beside scores, the fingerprint of whose they are: another model may have the same folder, or the name of it, by now."""


def evaluate(
    folder: Path,
    *,
    tasks: list[str],
    folder_of_tasks: Path | None,
    limit: int | None,
    cases: list[Path],
    chat: bool,
    out: Path | None,
) -> None:
    """Measure the model in `folder`, labelled by its name; the scores, in the form of a stage's, go to the file `out` as each part
    is done. Answers to cases are kept until then: what was cut off goes on there.

    Raises:
        ValueError: no model there, an unknown task, a malformed case, no chat template, or `out` has scores that would be lost, or
            something else.
    """
    found = scores_in(out) if out is not None and out.is_file() else {}
    asked = longeval.LongEval(
        tasks=[], lengths=[], samples=1, cases=[str(file) for file in cases], prompt="chat" if chat else "plain", seed=1
    )
    harness.answerable(tasks)
    longeval.read_published(asked)  # what is malformed is said before hours of tasks
    home = state_below(Path.cwd(), model=folder.resolve()) / "checkpoints"
    os.environ["LONGLORA_CHECKPOINTS"] = os.environ.get("LONGLORA_CHECKPOINTS") or str(home)
    pin(folder)
    label = folder.resolve().name
    if out is not None and found:
        must_not_be_lost(found, out, label=label, cases=cases if not tasks else [])
    # what was cut off amid the cases has the harness's scores already
    scores = kept_scores(found, out, label=label, folder=folder) if out is not None and "harness" in found else {}
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    if tasks:
        scores |= harness.measure(
            model,
            label=label,
            tokenizer=tokenizer,
            settings=harness.Harness(
                tasks=list(dict.fromkeys(tasks)),
                folder=str(folder_of_tasks) if folder_of_tasks else None,
                num_fewshot=None,
                limit=limit,
                prompt=asked.prompt,
                seed=1,
            ),
        )
        if out is not None:
            for node in scores.get("harness", {}).values():  # the first process has them
                node[MODEL] = fingerprint(folder, out)
            put(scores, out)
    if cases:
        with keeping(folder, model, scores=out or Path("longlora eval")) as kept:
            scores |= longeval.measure(model, label=label, tokenizer=tokenizer, settings=asked, kept=kept)
            if out is not None:
                put(scores, out)


def scores_in(out: Path) -> dict[str, Any]:
    """The scores in `out`.

    Raises:
        ValueError: it holds something else, such as the model's config or the cases, which would be written over.
    """
    text = out.read_bytes()
    try:
        found = json.loads(text or b"{}")
    except ValueError:  # no JSON
        found = None
    if not isinstance(found, dict) or not all(name.startswith(("harness", "longeval_")) for name in found):
        raise ValueError(
            f"--out {out}: is there, and holds no scores of this command, which would take its place: name a new file"
        )
    return found


def must_not_be_lost(found: dict[str, Any], out: Path, *, label: str, cases: list[Path]) -> None:
    """Check that the scores `found` in `out` are the harness's of the model `label`, and of some of `cases`, which are asked again.

    Raises:
        ValueError: there are others.
    """
    again = {file.stem for file in cases}
    for measure, by_label in found.items():
        for whose, node in by_label.items():
            names = {name for name, each in node.items() if isinstance(each, dict)}
            if whose != label or (names - again if measure != "harness" else not cases):
                said = ", ".join(sorted(names - again)) or measure
                raise ValueError(
                    f"--out {out}: has scores of '{whose}' ({said}), which this command would take out: name a new file"
                )


def kept_scores(found: dict[str, Any], out: Path, *, label: str, folder: Path) -> dict[str, Any]:
    """The harness's part of the scores `found` in `out`.

    Raises:
        ValueError: they are of another model, or do not say of which; they would be written over.
    """
    node = found["harness"][label]
    if MODEL not in node:
        raise ValueError(
            f"{out} has scores of lm-evaluation-harness and does not say of which model: name another --out"
        )
    if node[MODEL] != fingerprint(folder, out):
        raise ValueError(
            f"{out} has the harness's scores of another model, of the name or at the place of {folder}: name another --out"
        )
    return {"harness": {label: node}}


def fingerprint(folder: Path, out: Path) -> str:
    """Of what decides the scores: weights, configs, tokenizer and chat template; not of the scores themselves, should they stand
    among them."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(file for file in folder.iterdir() if file.suffix in kinds and file.resolve() != out.resolve())
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
