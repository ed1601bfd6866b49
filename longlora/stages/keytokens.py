"""Key tokens of the held-out documents, as one evaluator picks them."""

from pathlib import Path

from longlora.data.tokens import documents
from longlora.evaluation.longppl import LongPPL, key_tokens
from longlora.model.load import Precision, open_model
from longlora.parallel.sharding import write
from longlora.section import run


def stage(evaluator: Path, heldout: Path, keys: Path, longppl: LongPPL, precision: Precision) -> None:
    picked = key_tokens(open_model(evaluator, precision), documents=documents(heldout), settings=longppl)
    write(picked, keys, indent=None)


if __name__ == "__main__":
    run(stage)
