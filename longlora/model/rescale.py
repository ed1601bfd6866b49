"""The base under rotary scaling, untrained: the baseline that every claim of a fine-tune must beat.

An ordinary model folder. The weights are the base's files, hard-linked, so they are stored once.
"""

import os
import shutil
from pathlib import Path

from transformers import AutoConfig

from longlora.model.position import extend


def rescale(base: Path, *, method: str, context: int, out: Path) -> None:
    """Write `base` under `method` to the new folder `out`, all weights as they are.

    Raises:
        ValueError: the method cannot extend this base to `context` tokens.
    """
    config = extend(AutoConfig.from_pretrained(base, local_files_only=True), method=method, context=context)
    out.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.suffix == ".safetensors":
            link(file, out / file.name)
        else:
            shutil.copyfile(file, out / file.name)
    config.save_pretrained(out)


def link(source: Path, target: Path) -> None:
    """A hard link; a copy between file systems, where there can be no link."""
    if source.stat().st_dev == target.parent.stat().st_dev:
        os.link(source.resolve(), target)
    else:
        shutil.copyfile(source, target)
