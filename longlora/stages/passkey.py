"""Passkey retrieval of one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.evaluation.passkey import Passkey, measure
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, scores: Path, passkey: Passkey, precision: Precision) -> None:
    result = measure(open_model(model, precision), label=model.name, tokenizer=open_tokenizer(model), settings=passkey)
    write(result, scores)


if __name__ == "__main__":
    run(stage)
