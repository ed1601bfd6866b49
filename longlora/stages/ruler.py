"""RULER's synthetic tasks for one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.data.tokens import documents
from longlora.evaluation.answer import keeping
from longlora.evaluation.ruler import Ruler, measure
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, heldout: Path, scores: Path, ruler: Ruler, precision: Precision) -> None:
    tokenizer = open_tokenizer(model)
    texts = [str(tokenizer.decode(d, skip_special_tokens=True)) for d in documents(heldout)]
    opened = open_model(model, precision)
    with keeping(model, opened, scores=scores) as kept:
        result = measure(opened, label=model.name, tokenizer=tokenizer, texts=texts, settings=ruler, kept=kept)
        write(result, scores)


if __name__ == "__main__":
    run(stage)
