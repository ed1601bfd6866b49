"""Bring the base model."""

from pathlib import Path

from longlora.model.backbone import Backbone, fetch
from longlora.section import run


def stage(base: Path, backbone: Backbone) -> None:
    fetch(backbone, out=base)


if __name__ == "__main__":
    run(stage)
