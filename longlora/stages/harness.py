"""Tasks of lm-evaluation-harness for one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.harness import Harness, measure
from longlora.plain import open_model, open_tokenizer
from longlora.section import run
from longlora.shares import together, write


def stage(model: Path, scores: Path, harness: Harness) -> None:
    with together():
        result = measure(open_model(model), label=model.name, tokenizer=open_tokenizer(model), settings=harness)
    write(result, scores)


if __name__ == "__main__":
    run(stage)
