"""RULER's synthetic tasks for one model. The folder's name is the model's label."""

import shutil
from pathlib import Path

from longlora.data.blocks import documents
from longlora.evaluation.answer import kept_folder
from longlora.evaluation.ruler import Ruler, measure
from longlora.model.load import open_model, open_tokenizer
from longlora.parallel.sharding import rank, write
from longlora.section import run


def stage(model: Path, heldout: Path, scores: Path, ruler: Ruler) -> None:
    kept = kept_folder(model)
    tokenizer = open_tokenizer(model)
    texts = [str(tokenizer.decode(d, skip_special_tokens=True)) for d in documents(heldout)]
    result = measure(open_model(model), label=model.name, tokenizer=tokenizer, texts=texts, settings=ruler, kept=kept)
    write(result, scores)
    if rank() == 0:
        shutil.rmtree(kept, ignore_errors=True)


if __name__ == "__main__":
    run(stage)
