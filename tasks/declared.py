"""What dvc.yaml declares beside its stages: `artifacts:`."""

from dataclasses import dataclass
from typing import Any

from dvc.repo import Repo


@dataclass(frozen=True)
class Artifact:
    """An entry of dvc.yaml's `artifacts:`."""

    name: str
    path: str
    """Relative to the project."""
    type: str
    desc: str
    labels: list[str]
    meta: dict[str, Any]


def artifacts_in(repo: Repo) -> list[Artifact]:
    # repo.artifacts.read() gives the same, and takes a second to import a package that checks the names
    return [
        Artifact(
            name=name,
            path=entry["path"],
            type=entry.get("type", ""),
            desc=entry.get("desc", ""),
            labels=entry.get("labels", []),
            meta=entry.get("meta", {}),
        )
        for file in repo.index._artifacts.values()  # pyright: ignore[reportPrivateUsage], as said above
        for name, entry in file.items()
    ]
