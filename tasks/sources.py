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

from tasks.hashes import hash_of, named

SOURCES = "sources.yaml"


def hashed(text: str, params: str, tree: Path, seen: dict[str, str] | None = None) -> str:
    """`text`, which is that of sources.yaml, with the hashes of all paths that its sections of `params` name. If it has
    these hashes already, it is returned as it is, byte for byte.

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

    DVC computes it, and remembers it by the files' times. What DVC tracks is not read: its `.dvc` file has the hash. What an
    absolute path names is always read, for a run reads it where it lies, edited or not."""
    place = tree / os.path.expanduser(word)
    if not os.path.isabs(os.path.expanduser(word)) and (said := named(place.with_name(f"{place.name}.dvc"))):
        return said
    if not os.path.exists(place) or tree.resolve().is_relative_to(place.resolve()):  # "" and "." are no data
        return ""
    from dvc.repo import Repo  # DVC takes half a second to import

    with Repo(str(tree)) as repo:
        return hash_of(place, repo.cache.local)


def must_be_as_named(sections: list[str], folder: Path) -> None:
    """Check that what `sections` name outside of the run's folder is still what its sources.yaml says: git and DVC keep the rest.

    Raises:
        ValueError: somebody changed it since the snapshot was made.
    """
    hashes_of = yaml.safe_load((folder / SOURCES).read_text()) if sections else {}
    for word, digest in (each for name in sections for each in hashes_of[name].items()):
        if is_elsewhere(word, folder) and hash_at(word, folder) != digest:
            raise ValueError(
                f"{word} was changed while the run was at work: nothing of this stage is kept; the same command again is a run on "
                "what is there now"
            )


def is_elsewhere(word: str, folder: Path) -> bool:
    """Whether the path `word` leads out of `folder`."""
    return not (folder / os.path.expanduser(word)).resolve().is_relative_to(folder.resolve())
