"""The door to lm-evaluation-harness (Gao et al.): LongBench, LongBench v2, SCROLLS, and tasks of your own.

The harness is an extra (`pip install 'longlora-pipeline[eval]'`). It is handed a model that is opened as all others are, in full
attention; its tasks bring their data from the hub, or from files that a task's own YAML names. No code of a data set is run.
Among several processes each answers its share (longlora/evaluation/harness_sharding.py).
"""

import importlib.util
import math
from collections import deque
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.evaluation.interval import binomial, figure
from longlora.parallel.sharding import gathered, rank, say
from longlora.section import Once, Section, Seed, first_line, nearest

QUANTILE = 1.959964
"""Of the normal distribution: the harness gives standard errors, and 95 % lie within that many of them."""
MADE_BY_LENGTH = ("ruler", "niah_", "babilong")
"""Tasks, and beginnings of their names, that write or choose their texts by lengths that their own settings say. Without them
RULER's fail, and BABILong asks without any filler. They open tokenizers with `trust_remote_code`, which here stays off."""
BOOTSTRAPS = 100_000
"""Of a metric whose standard error has no formula: the harness's own number."""


def answerable(tasks: list[str]) -> list[str]:
    """`tasks`.

    Raises:
        ValueError: one of them takes its lengths from the harness's own command alone.
    """
    for task in tasks:
        if task.startswith(MADE_BY_LENGTH):
            raise ValueError(
                f"'{task}' takes its lengths from the harness's own command alone: lm_eval run --model hf --model_args "
                f"pretrained=FOLDER --tasks {task} --metadata '{{\"max_seq_lengths\": ...}}'"
            )
    return tasks


class Harness(Section):
    tasks: Annotated[list[str], Once, AfterValidator(answerable)]
    """Tasks or groups by the harness's own names."""
    folder: str | None
    """A folder with task files of your own, which are known beside the harness's."""
    num_fewshot: int | None = Field(ge=0)
    """Examples in the prompt; null takes each task's own."""
    limit: int | None = Field(gt=0)
    """Questions of each task, at most; null asks all. Scores of a part are not for publication."""
    prompt: Literal["plain", "chat"]
    """chat: in the tokenizer's own template."""
    seed: Seed


def measure(
    model: PreTrainedModel, *, label: str, tokenizer: PreTrainedTokenizerBase, settings: Harness
) -> dict[str, Any]:
    """Every metric of every task for the model `label`, with 95 % intervals, and how many prompts were cut to its positions. Among
    several processes only the first is told them.

    Raises:
        ValueError: the harness is not installed, a task is unknown (the nearest is named), needs one more package or data that is
            not reached, or there is no chat template.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'longlora-pipeline[eval]'")
    if not settings.tasks:
        raise ValueError("harness.tasks names no task; name one, or leave evaluate.harness empty")
    if settings.prompt == "chat" and not tokenizer.chat_template:
        raise ValueError("prompt = chat needs a tokenizer with a chat template, and this one has none: use plain")
    # Imported here, for it is an extra and takes ten seconds.
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from longlora.evaluation.harness_sharding import Dealt

    if settings.folder is not None:
        must_be_tasks(Path(settings.folder))
    # The harness takes half a minute to look through its own thousands of tasks; for one's own it need not.
    known = TaskManager(include_path=settings.folder, include_defaults=False) if settings.folder else None
    if known is None or not set(settings.tasks) <= set(known.all_tasks):
        known = TaskManager(include_path=settings.folder)
    for task in settings.tasks:
        if task not in known.all_tasks:
            raise ValueError(f"harness.tasks: the harness has no task '{task}'{hint(task, known.all_tasks)}")
    asked = Dealt(pretrained=model, tokenizer=tokenizer, batch_size=1)
    try:
        found = simple_evaluate(
            model=asked,
            tasks=list(settings.tasks),
            task_manager=known,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAPS if rank() == 0 else 0,
            log_samples=False,
            apply_chat_template=settings.prompt == "chat",
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    # a package that some tasks need beside the harness; data that is not reached
    except (ImportError, OSError) as error:
        raise ValueError(f"harness.tasks {', '.join(settings.tasks)}: {first_line(error)}") from error
    cut = sum(map(int, gathered(str(asked.cut).encode())))
    if rank() > 0:
        return {}
    assert found is not None  # it is None where LOCAL_RANK is not 0
    results: dict[str, Any] = dict(found)
    trials = {task: counts["effective"] for task, counts in results.get("n-samples", {}).items()}
    scores = {str(task): metrics(row, trials=trials.get(task)) for task, row in results["results"].items()}
    for task, row in scores.items():
        told = {name: "NaN" if score["value"] is None else f"{score['value']:.4g}" for name, score in row.items()}
        say(f"{task}: " + ", ".join(f"{name} {value}" for name, value in told.items()))
    if cut:
        say(f"{cut} prompts were longer than the model's {asked.max_length} positions, and lost their beginning")
    asked_for = {"limit": settings.limit, "num_fewshot": settings.num_fewshot}
    part = {name: number for name, number in asked_for.items() if number is not None}
    return {"harness": {label: {"prompt": settings.prompt, **part, "cut": cut, **scores}}}


def must_be_tasks(folder: Path) -> None:
    """Raises ValueError: there is no such folder, or a file in it is no YAML: the harness would know none of its tasks."""
    if not folder.is_dir():
        raise ValueError(f"harness.folder: no folder {folder} (seen from {Path.cwd()})")
    for file in sorted(folder.rglob("*.yaml")):
        try:
            deque(yaml.parse(file.read_text()), maxlen=0)  # its syntax alone: tags name functions
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None


def hint(task: str, known: list[str]) -> str:
    """The nearest name; without one, no list of thousands."""
    said = nearest(task, known)
    return said if said.startswith("; did you mean") else ""


def metrics(row: dict[str, Any], *, trials: int | None) -> dict[str, dict[str, float | None]]:
    """The metrics of a task of so many `trials` (None for a group of tasks), `metric` or `metric filter`, with the ends of their
    95 % intervals; null where one is not finite (JSON has no NaN)."""
    found = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else f"{metric} {kind}"] = figure(value, interval(value, error, trials=trials))
    return found


def interval(value: float, error: Any, *, trials: int | None) -> tuple[float, float]:
    """Exact for a share of trials that are right or wrong, else by the harness's standard error; NaN without one, and where it is
    zero, for trials that all came out alike say nothing of their spread.

    Among scores from 0 to 1 of one mean those of 0 and 1 spread most, and only they: so the error tells them from others.
    """
    if not isinstance(error, int | float):
        return math.nan, math.nan
    if (
        trials
        and trials > 1
        and 0 <= value <= 1
        and math.isclose(error, math.sqrt(value * (1 - value) / (trials - 1)), abs_tol=1e-9)
    ):
        return binomial(round(value * trials), trials)
    return (value - QUANTILE * error, value + QUANTILE * error) if error else (math.nan, math.nan)
