"""Measures outside of a run, for the command line: the library's own, on any model folder."""

import json
from pathlib import Path
from typing import Any

from longlora.evaluation import harness, longeval
from longlora.evaluation.answer import keeping
from longlora.model.load import open_model, open_tokenizer
from longlora.parallel.sharding import put
from tasks.locks import pin


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
        ValueError: no model there, an unknown task, a malformed case, or no chat template.
    """
    asked = longeval.LongEval(
        tasks=[], lengths=[], samples=1, cases=[str(file) for file in cases], prompt="chat" if chat else "plain", seed=1
    )
    longeval.read_published(asked)  # what is malformed is said before hours of tasks
    pin(folder)
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    label = folder.resolve().name
    scores: dict[str, Any] = {}
    # what was cut off amid the cases has the harness's scores already
    if not tasks and out is not None and out.is_file():
        found = json.loads(out.read_text()).get("harness", {})
        scores |= {"harness": {label: found[label]}} if label in found else {}
    if tasks:
        scores |= harness.measure(
            model,
            label=label,
            tokenizer=tokenizer,
            settings=harness.Harness(
                tasks=tasks,
                folder=str(folder_of_tasks) if folder_of_tasks else None,
                num_fewshot=None,
                limit=limit,
                prompt=asked.prompt,
                seed=1,
            ),
        )
        if out is not None:
            put(scores, out)
    if cases:
        with keeping(folder, model, scores=out or Path("longlora eval")) as kept:
            scores |= longeval.measure(model, label=label, tokenizer=tokenizer, settings=asked, kept=kept)
            if out is not None:
                put(scores, out)
