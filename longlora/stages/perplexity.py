"""Perplexity of one model by context length. The folder's name is the model's label."""

import json
from pathlib import Path

from longlora.blocks import documents
from longlora.perplexity import Perplexity, measure
from longlora.plain import open_model
from longlora.section import run


def stage(model: Path, heldout: Path, scores: Path, parts: Path, perplexity: Perplexity) -> None:
    scores.parent.mkdir(parents=True, exist_ok=True)
    result = measure(
        open_model(model), label=model.name, documents=documents(heldout), settings=perplexity, parts=parts
    )
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run(stage)
