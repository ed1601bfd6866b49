"""Passkey retrieval of one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.passkey import Passkey, measure
from longlora.plain import open_model, open_tokenizer
from longlora.section import run
from longlora.shares import write


def stage(model: Path, scores: Path, passkey: Passkey) -> None:
    result = measure(open_model(model), label=model.name, tokenizer=open_tokenizer(model), settings=passkey)
    write(result, scores)


if __name__ == "__main__":
    run(stage)
