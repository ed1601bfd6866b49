"""Bring a model of yours beside the others, if it can be compared with them."""

from pathlib import Path

from longlora.model.rival import Rivals, admit
from longlora.section import run


def stage(rival: Path, base: Path, model: Path, rivals: Rivals) -> None:
    assert model.name in rivals.models
    admit(rival, base=base, out=model)


if __name__ == "__main__":
    run(stage)
