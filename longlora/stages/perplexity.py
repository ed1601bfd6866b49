"""Perplexity of one model by context length. The folder's name is the model's label."""

from pathlib import Path

from longlora.blocks import documents
from longlora.perplexity import Perplexity, measure
from longlora.plain import open_model
from longlora.section import run
from longlora.shares import write


def stage(model: Path, heldout: Path, scores: Path, parts: Path, perplexity: Perplexity) -> None:
    result = measure(
        open_model(model), label=model.name, documents=documents(heldout), settings=perplexity, parts=parts
    )
    write(result, scores)


if __name__ == "__main__":
    run(stage)
