"""Tasks of lm-evaluation-harness for one model. The folder's name is the model's label."""

import json
from pathlib import Path

from longlora.harness import Harness, measure
from longlora.plain import open_model, open_tokenizer
from longlora.section import run


def stage(model: Path, scores: Path, harness: Harness) -> None:
    result = measure(open_model(model), label=model.name, tokenizer=open_tokenizer(model), settings=harness)
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run(stage)
