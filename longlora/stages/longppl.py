"""LongPPL of one model over the key tokens that an evaluator picked. The folder's name is the model's label, the key file's is
the evaluator's."""

import json
from pathlib import Path

from longlora.data.tokens import documents
from longlora.evaluation.longppl import LongPPL, measure
from longlora.model.load import Precision, open_model
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, keys: Path, heldout: Path, scores: Path, longppl: LongPPL, precision: Precision) -> None:
    result = measure(
        open_model(model, precision),
        label=model.name,
        evaluator=keys.stem,
        documents=documents(heldout),
        keys=json.loads(keys.read_text()),
    )
    write(result, scores)


if __name__ == "__main__":
    run(stage)
