"""Where a finished run is kept: a git commit under its own ref, its data on the DVC remote.

The commit's tree is the run's snapshot with the dvc.lock it made, so `git show REF:dvc.lock` has every hash, and any clone that has
the ref and reaches the remote has the run.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tasks.workspace import Project, Snapshot, commit_tree, git, record_ref, stage_file


@dataclass(frozen=True)
class Finished:
    """That a run is recorded everywhere: written last, read first."""

    record: str
    run_id: str
    tracking: str


def record(where: Project, state: Snapshot, folder: Path) -> str:
    """Commit `folder`'s dvc.lock on top of the snapshot, under the run's ref. The same lock gives the same commit."""
    commit = record_commit(where, state, folder)
    git("update-ref", record_ref(state.key), commit, cwd=where.root)
    return commit


def record_commit(where: Project, state: Snapshot, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git("read-tree", state.commit, cwd=where.root, env=index)
        stage_file(where.root, "dvc.lock", (folder / "dvc.lock").read_text(), index)
        content = git("write-tree", cwd=where.root, env=index)
    return commit_tree(where.root, content, state.commit, f"run {state.key}")


def publish(where: Project, key: str) -> str:
    """Push the run's ref to the git remote named by LONGLORA_GIT_REMOTE; its address without credentials, or ''."""
    remote = os.environ.get("LONGLORA_GIT_REMOTE")
    if not remote:
        return ""
    git("push", "--quiet", "--force", "--", remote, f"{record_ref(key)}:{record_ref(key)}", cwd=where.root)
    names = git("remote", cwd=where.root).split()
    return without_credentials(git("remote", "get-url", "--", remote, cwd=where.root) if remote in names else remote)


def without_credentials(url: str) -> str:
    """`url` without user and password."""
    parts = urlsplit(url)
    if not parts.scheme or "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def note(where: Project, key: str, finished: Finished) -> None:
    """Remember that run `key` is recorded everywhere, in one step."""
    path = where.state / "finished" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(finished)))
    scratch.replace(path)


def noted(where: Project, key: str) -> Finished | None:
    path = where.state / "finished" / f"{key}.json"
    return Finished(**json.loads(path.read_text())) if path.exists() else None
