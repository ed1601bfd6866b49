"""What a commit says of outputs, and what the files themselves say."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml
from dvc.api import DVCFileSystem  # pyright: ignore[reportPrivateUsage], it is public by this name
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.declared import Artifact, artifacts_in
from tasks.hashes import hash_of
from tasks.workspace import git


@dataclass(frozen=True)
class Compared:
    """One output of a recorded run beside the file or folder on the disk."""

    stage: str
    path: str
    recorded: str
    found: str
    """Its hash as read from the disk now; '' if it is not there."""
    varies: bool

    @property
    def equal(self) -> bool:
        return self.recorded == self.found


def artifacts_at(repo: Path, rev: str | None) -> list[Artifact]:
    """`artifacts:` of dvc.yaml at commit `rev`; without it, as the file is."""
    with Repo(str(repo), rev=rev) as past:
        return artifacts_in(past)


def curves_at(repo: Path, rev: str) -> set[str]:
    """The names, before the first '/', of metrics that come from a CSV plot of dvc.yaml at commit `rev`."""
    with Repo(str(repo), rev=rev) as past:
        return {Path(out.def_path).stem for out in past.index.outs if out.plot and out.def_path.endswith(".csv")}


def read(repo: Path, rev: str, path: str) -> str:
    """The text of `path` at commit `rev`, from git, DVC's cache or its remote.

    Raises:
        ValueError: it is not there, or not what was recorded: a run's files are links into the cache, and who writes into one
            in spite of its mode writes there.
    """
    files = DVCFileSystem(str(repo), rev=rev)
    try:
        recorded, data = (files.info(path).get("dvc_info") or {}).get("md5"), files.read_bytes(path)
    except (FileNotFoundError, DvcException) as error:
        raise ValueError(f"{path} at {rev[:12]} is neither in the cache nor on the DVC remote: {error}") from None
    assert isinstance(data, bytes)  # who names no part of a file gets no text
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if recorded and found != recorded:
        raise ValueError(f"{path} at {rev[:12]} is damaged in the cache: its hash is {found}, and must be {recorded}")
    return data.decode()


def compared(root: Path, commit: str, folder: Path, *, varying: set[str]) -> list[Compared]:
    """Every output in dvc.lock of `commit` (of the git repository `root`), beside what `folder` has."""
    lock = yaml.safe_load(git("show", f"{commit}:dvc.lock", cwd=root))
    return [
        Compared(stage, out["path"], out["md5"], hash_of(folder / out["path"]), out["path"] in varying)
        for stage, entry in lock["stages"].items()
        for out in entry.get("outs", [])
    ]
