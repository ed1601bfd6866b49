"""Facts about the merged model's files."""

import json
from pathlib import Path

from longlora.model.integrity import measure
from longlora.model.position import Position
from longlora.section import run


def stage(base: Path, extended: Path, scores: Path, position: Position) -> None:
    result = measure(base, extended=extended, position=position)
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run(stage)
