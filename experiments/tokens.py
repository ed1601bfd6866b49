"""The texts and recall questions of a study, tokenised by the pipeline's own stage."""

import sys
from pathlib import Path

from experiments.arm import settings_of
from longlora.data.blocks import Blocks
from longlora.model.position import Position
from longlora.section import section_of
from longlora.stages.blocks import stage


def main(study: str, base: Path, out: Path) -> None:
    settings = settings_of(Path.cwd(), study)
    blocks, position = section_of(Blocks, settings, "blocks"), section_of(Position, settings, "position")
    out.mkdir(parents=True, exist_ok=True)
    stage(base, out / "tokens", out / "heldout.safetensors", out / "counts.json", blocks, position)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
