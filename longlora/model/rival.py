"""A model of yours beside the one in question, such as the present champion: measured like it, on the same data.

Perplexity is per token, so models that read a text as other tokens cannot be compared: such a rival is refused before anything
is measured.
"""

import shutil
from pathlib import Path

from longlora.model.integrity import tokenizer
from longlora.model.rescale import link
from longlora.section import Section


class Rivals(Section):
    models: list[str]
    """Folders of rivals/, by name; the matrices of dvc.yaml are this list. `longlora run --beside champion` fills it in."""


def admit(rival: Path, *, base: Path, out: Path) -> None:
    """The model of folder `rival` as the new folder `out`, its weights hard-linked.

    Raises:
        ValueError: its tokenizer is not the base's.
    """
    fact = tokenizer(base, extended=rival)
    if not fact.value:
        raise ValueError(f"rivals.models: {rival.name} cannot be compared: {fact.reason}")
    out.mkdir(parents=True)
    for file in sorted(each for each in rival.iterdir() if each.is_file()):
        if file.suffix == ".safetensors":
            link(file, out / file.name)
        else:
            shutil.copyfile(file, out / file.name)
