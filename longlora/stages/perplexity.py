"""Perplexity of one model by context length. The folder's name is the model's label."""

from pathlib import Path

from longlora.data.tokens import documents
from longlora.evaluation.perplexity import Perplexity, measure
from longlora.model.load import Precision, open_model
from longlora.parallel.sharding import write
from longlora.section import run


def stage(model: Path, heldout: Path, scores: Path, parts: Path, perplexity: Perplexity, precision: Precision) -> None:
    result = measure(
        open_model(model, precision), label=model.name, documents=documents(heldout), settings=perplexity, parts=parts
    )
    if perplexity.sliding:  # by another stride the tokens have other contexts
        result["sliding_perplexity"][model.name]["stride"] = perplexity.sliding.stride
    write(result, scores)


if __name__ == "__main__":
    run(stage)
