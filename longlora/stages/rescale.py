"""Write a baseline: the base under untrained rotary scaling. The folder is named by the method."""

from pathlib import Path
from typing import cast

from longlora.model.position import Method, Position
from longlora.model.rescale import rescale
from longlora.section import run


def stage(base: Path, model: Path, position: Position) -> None:
    rescale(base, method=cast(Method, model.name), context=position.context, out=model)


if __name__ == "__main__":
    run(stage)
