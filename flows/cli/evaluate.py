"""Measures outside of a run, for the command line: the library's own, on any model folder."""

from pathlib import Path
from typing import Any

from longlora.evaluation import harness, longeval
from longlora.model.load import open_model, open_tokenizer
from tasks.locks import pin


def evaluate(
    folder: Path, *, tasks: list[str], folder_of_tasks: Path | None, limit: int | None, cases: list[Path], chat: bool
) -> dict[str, Any]:
    """The scores of the model in `folder`, labelled by its name, in the form of a stage's.

    Raises:
        ValueError: no model there, an unknown task, a malformed case, or no chat template.
    """
    pin(folder)
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    prompt, label = ("chat" if chat else "plain"), folder.resolve().name
    scores: dict[str, Any] = {}
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
                prompt=prompt,
                seed=1,
            ),
        )
    if cases:
        asked = longeval.LongEval(
            tasks=[], lengths=[], samples=1, cases=[str(file) for file in cases], prompt=prompt, seed=1
        )
        scores |= longeval.measure(model, label=label, tokenizer=tokenizer, settings=asked)
    return scores
