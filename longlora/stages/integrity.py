"""Facts about the merged model's files."""

from pathlib import Path

from longlora.model.integrity import measure
from longlora.model.position import Position
from longlora.section import run, write_json


def stage(base: Path, extended: Path, scores: Path, position: Position) -> None:
    result = measure(base, extended=extended, position=position)
    write_json(result, scores)


if __name__ == "__main__":
    run(stage)
