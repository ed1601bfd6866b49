"""A watched place outside of git: whether its data changed since a run last finished on it.

The place must be a dependency in dvc.yaml, so that DVC sees the change too and computes what stands on it anew; and its hash
becomes part of the run's snapshot (watched.json), so that a run on other data is another run, with a record of its own.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dvc.repo import Repo

from tasks.hashes import hash_of
from tasks.workspace import Addition, Project


@dataclass(frozen=True)
class Watched:
    path: Path
    now: str
    """Its hash, as DVC would give it."""
    note: Path
    """Where the hash of the last finished run is kept."""

    @property
    def changed(self) -> bool:
        return not self.note.exists() or self.note.read_text() != self.now

    def addition(self) -> Addition:
        """What it is to the run: other data, another run."""
        return Addition(files={"watched.json": json.dumps({str(self.path): self.now}, indent=1) + "\n"})

    def remember(self) -> None:
        """A run on it has finished. If it changed under the run, that is not remembered, and the next look runs again."""
        if hash_of(self.path) != self.now:
            return
        self.note.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.note.with_suffix(f".{os.getpid()}")
        scratch.write_text(self.now)
        scratch.replace(self.note)


def watched(where: Project, path: str, *, recipe: str | None, overrides: list[str]) -> Watched:
    """The place as it is now; what is remembered of it is remembered per recipe and overrides.

    Raises:
        ValueError: as `watchable`.
    """
    place = watchable(where, path)
    name = look(str(place), recipe=recipe, overrides=overrides)
    return Watched(place, hash_of(place), where.state / "watched" / name)


def look(path: str, *, recipe: str | None, overrides: list[str]) -> str:
    """A name for a look at `path` on behalf of runs with this recipe and these overrides."""
    return hashlib.sha256("\0".join([path, recipe or "", *overrides]).encode()).hexdigest()[:16]


def watchable(where: Project, path: str) -> Path:
    """`path`, absolute.

    Raises:
        ValueError: it is not there, or no stage depends on it, so that new data there would change nothing.
    """
    place = (where.tree / path).resolve()
    if not place.exists():
        raise ValueError(f"--watch {path}: there is nothing at {place}")
    with Repo(str(where.tree)) as repo:
        known = sorted({dep.def_path for stage in repo.index.stages for dep in stage.deps})
    if not any((where.tree / each).resolve() == place for each in known):
        raise ValueError(
            f"--watch {path}: no stage reads it; name {place} among the deps of the one that does, in dvc.yaml"
        )
    return place
