"""Tasks of lm-evaluation-harness for one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.evaluation.harness import Harness, measure
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.parallel.sharding import together, write
from longlora.section import run


def stage(model: Path, scores: Path, harness: Harness, precision: Precision) -> None:
    with together():
        result = measure(
            open_model(model, precision), label=model.name, tokenizer=open_tokenizer(model), settings=harness
        )
    write(result, scores)


if __name__ == "__main__":
    run(stage)
