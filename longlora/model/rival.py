"""A model of yours beside the one in question, such as the present champion: measured like it, on the same data.

Perplexity is per token, so models that read a text as other tokens cannot be compared: such a rival is refused before anything
is measured.
"""

import re
import shutil
from pathlib import Path

from pydantic import field_validator

from longlora.model.integrity import tokenizer
from longlora.model.rescale import link
from longlora.section import Section


class Rivals(Section):
    models: list[str]
    """Folders of rivals/, by name; the matrices of dvc.yaml are this list. `longlora run --beside champion` fills it in."""

    @field_validator("models")
    @classmethod
    def are_names(cls, models: list[str]) -> list[str]:
        """They stand in the command lines of dvc.yaml and in paths."""
        for name in models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"'{name}' is no name: letters, digits and . _ - only, a letter or digit first")
        return models


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
