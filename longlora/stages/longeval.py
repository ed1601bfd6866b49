"""LongEval's lines and topics for one model. The folder's name is the model's label."""

import shutil
from pathlib import Path

from longlora.evaluation.answer import kept_folder
from longlora.evaluation.longeval import LongEval, measure
from longlora.model.load import open_model, open_tokenizer
from longlora.parallel.sharding import rank, write
from longlora.section import run


def stage(model: Path, scores: Path, longeval: LongEval) -> None:
    kept = kept_folder(model)
    result = measure(open_model(model), label=model.name, tokenizer=open_tokenizer(model), settings=longeval, kept=kept)
    write(result, scores)
    if rank() == 0:
        shutil.rmtree(kept, ignore_errors=True)


if __name__ == "__main__":
    run(stage)
