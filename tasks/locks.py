"""Locks of this machine, below the state folder of a clone: who works on a run, and who reads from what gc might delete.

The kernel frees a lock when its holder dies, however it dies.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tasks.workspace import Project


@contextmanager
def hold(where: Project, key: str) -> Generator[None]:
    """Be the only one who works on run `key`; says so if that takes waiting."""
    folder = where.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process works on {key}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def if_free(where: Project, key: str) -> Generator[bool]:
    """`hold`, unless another process does; whether none did."""
    folder = where.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_held(where: Project, key: str) -> bool:
    """Whether a process of this machine works on run `key` now."""
    path = where.state / "locks" / f"{key}.lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def pin(folder: Path) -> None:
    """Keep gc from deleting the run's worktree or fetched model that `folder` is in, until this process ends.

    The lock outlives an exec. What we may not write to, gc could not delete either: there nothing is locked.
    """
    for each in (folder.resolve(), *folder.resolve().parents):
        state = each.parent.parent
        # what `.longlora` links to may have any name; servers.use_environment has made prefect/ there
        ours = state.name == ".longlora" or (state / "prefect").is_dir()
        if ours and each.parent.name in ("worktrees", "asked") and os.access(state, os.W_OK):
            (state / "locks").mkdir(exist_ok=True)
            lock = state / "locks" / f"{readers(each.name)}.lock"
            file = os.open(lock, os.O_CREAT, 0o666)  # the kernel closes it, at the end
            os.set_inheritable(file, True)
            fcntl.flock(file, fcntl.LOCK_SH)


def unpinned(where: Project, name: str) -> AbstractContextManager[bool]:
    """Whether no process has a `pin` on the worktree or model `name`; if so, none sets one meanwhile."""
    return if_free(where, readers(name))


def readers(name: str) -> str:
    """What those who `pin` worktree or model `name` hold; not the run's key: a model is served while its run goes on."""
    return f"{name}.readers"
