"""Hashes of data paths named in params.yaml, so changed data changes the run key.

dvc.yaml cannot have such a path among its deps: params.yaml decides which it is, and whether there is one. Instead sources.yaml has
a section for each section of params.yaml that may name paths, stages have it among their params, and a run's snapshot holds the
hashes of what was there when it was made. So a clone without the data can bring the run back.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.hashes import hash_of

SOURCES = "sources.yaml"


def hashed(text: str, params: str, tree: Path, seen: dict[str, str] | None = None) -> str:
    """`text`, that of sources.yaml, with the hash of each path that its sections of `params` name; the very same, if it has them.

    Args:
        seen: the hash that each word of these sections had before, '' for one that is no path; new words are added.

    Raises:
        ValueError: a path's hash is another than the one in `seen`.
    """
    known, sections, seen = yaml.safe_load(text) or {}, yaml.safe_load(params) or {}, {} if seen is None else seen
    now = {name: hashes(words(sections.get(name)), tree, seen) for name in known}
    return text if now == known else yaml.safe_dump(now, sort_keys=False, allow_unicode=True)


def hashes(named: Iterator[str], tree: Path, seen: dict[str, str]) -> dict[str, str]:
    now = {word: hash_at(word, tree) for word in named}
    for word, digest in now.items():
        if seen.setdefault(word, digest) != digest:
            raise ValueError(
                f"{word}: its data is not what it was at the start, and scores on other data are other numbers"
            )
    return {word: digest for word, digest in now.items() if digest}


def words(value: Any) -> Iterator[str]:
    """All texts in `value`, whatever it is."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from words(each)
    elif isinstance(value, str):
        yield value


def hash_at(word: str, tree: Path) -> str:
    """The hash of what lies at the path `word`, seen from the checkout `tree`; '' if nothing does.

    It is as DVC gives it, and remembers it by the files' times; what DVC tracks says it itself."""
    place = tree / os.path.expanduser(word)
    if not os.path.exists(place) or tree.resolve().is_relative_to(place.resolve()):  # "" and "." are no data
        return ""
    if (pointer := place.with_name(f"{place.name}.dvc")).is_file():
        return str(yaml.safe_load(pointer.read_text())["outs"][0]["md5"])
    from dvc.repo import Repo  # DVC takes half a second to import

    with Repo(str(tree)) as repo:
        return hash_of(place, repo.cache.local)
