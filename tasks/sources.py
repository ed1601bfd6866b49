"""Hashes of data paths named in params.yaml, so changed data changes the run key.

Which path that is, and whether there is one, is said in params.yaml, so dvc.yaml cannot have it among its deps. Instead
sources.yaml has a section for each one of params.yaml that may name paths, stages have it among their params, and a run's snapshot
has in it what lay there when it was made. A clone without the data can so bring the run back.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.hashes import hash_of

SOURCES = "sources.yaml"


def sources_now(tree: Path, params: str) -> dict[str, str]:
    """sources.yaml of the checkout `tree`, by its name, where `params` makes it another; nothing if it stays, or is not there."""
    file = tree / SOURCES
    text = file.read_text("utf-8") if file.exists() else ""
    now = hashed(text, params, tree)
    return {SOURCES: now} if now != text else {}


def hashed(text: str, params: str, tree: Path) -> str:
    """The text of sources.yaml with the hash of each path that its sections of `params` name; the very same, if it has them."""
    known, sections = yaml.safe_load(text) or {}, yaml.safe_load(params)
    now = {name: {path: hash_at(path, tree) for path in paths(sections.get(name), tree)} for name in known}
    return text if now == known else yaml.safe_dump(now, sort_keys=False, allow_unicode=True)


def paths(value: Any, tree: Path) -> Iterator[str]:
    """The words in `value` that are a path to something, seen from the checkout `tree`."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from paths(each, tree)
    elif isinstance(value, str):
        place = place_of(value, tree)
        if os.path.exists(place) and not tree.resolve().is_relative_to(place.resolve()):  # "" and "." are no data
            yield value


def place_of(path: str, tree: Path) -> Path:
    return tree / os.path.expanduser(path)


def hash_at(path: str, tree: Path) -> str:
    """The hash of what lies there, as DVC gives it, and remembers it by the files' times; what DVC tracks says it itself."""
    place = place_of(path, tree)
    if (pointer := place.with_name(f"{place.name}.dvc")).is_file():
        return str(yaml.safe_load(pointer.read_text())["outs"][0]["md5"])
    from dvc.repo import Repo  # DVC takes half a second to import

    with Repo(str(tree)) as repo:
        return hash_of(place, repo.cache.local)
