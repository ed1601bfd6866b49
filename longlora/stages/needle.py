"""Needles in held-out text for one model. The folder's name is the model's label."""

from pathlib import Path

from longlora.data.tokens import documents
from longlora.evaluation.needle import Needle, measure
from longlora.model.load import Precision, open_model, open_tokenizer
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, heldout: Path, scores: Path, needle: Needle, precision: Precision) -> None:
    tokenizer = open_tokenizer(model)
    texts = [str(tokenizer.decode(d, skip_special_tokens=True)) for d in documents(heldout)]
    result = measure(open_model(model, precision), label=model.name, tokenizer=tokenizer, texts=texts, settings=needle)
    write(result, scores)


if __name__ == "__main__":
    run(stage)
