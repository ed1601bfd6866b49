"""The base under rotary scaling, untrained: the baseline that every claim of a fine-tune must beat.

An ordinary model folder. The weights are the base's files, hard-linked, so they are stored once.
"""

import os
import shutil
from pathlib import Path

from transformers import AutoConfig

from longlora.model.position import Method, extend, reach


def rescale(base: Path, *, method: Method, context: int, out: Path) -> None:
    """Write `base` under `method` to the new folder `out`, all weights as they are.

    Where `base` reaches `context` tokens already, there is nothing to scale: the baseline is the base itself.

    Raises:
        ValueError: the method cannot extend this base to `context` tokens.
    """
    own = AutoConfig.from_pretrained(base, local_files_only=True)
    within = context <= reach(own.get_text_config())
    config = extend(own, method="none" if within else method, context=context)
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
