"""LongEval's lines and topics for one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.evaluation.answer import keeping
from longlora.evaluation.longeval import LongEval, measure
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, scores: Path, longeval: LongEval, precision: Precision) -> None:
    opened, tokenizer = open_model(model, precision), open_tokenizer(model)
    with keeping(model, opened, scores=scores) as kept:
        result = measure(opened, label=model.name, tokenizer=tokenizer, settings=longeval, kept=kept)
        write(result, scores)


if __name__ == "__main__":
    run(stage)
