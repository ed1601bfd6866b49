"""Locks of this machine, below the state folder of a clone: who works on a run, and who reads from what gc might delete.

The kernel frees a lock when its holder dies, however it dies. Its file stays; those of flow runs, of which each has its own, gc
deletes.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tasks.workspace import Project

FLOW = "flow-"
"""How the names of flow runs' locks begin."""


@contextmanager
def hold(where: Project, key: str) -> Generator[None]:
    """Be the only one who works on run `key`; says so if that takes waiting."""
    with if_free(where, key) as free:
        if free:
            yield
            return
    print(f"waiting: another process works on {key}", flush=True)
    with locked(where, key, fcntl.LOCK_EX):
        yield


@contextmanager
def if_free(where: Project, key: str) -> Generator[bool]:
    """As `hold`, without waiting: yields whether the lock was free, and is held if it was."""
    try:
        file = locked(where, key, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    with file:
        yield True


def is_held(where: Project, key: str) -> bool:
    """Whether a process of this machine works on run `key` now."""
    try:
        locked(where, key, fcntl.LOCK_SH | fcntl.LOCK_NB, mode="r").close()
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def locked(where: Project, key: str, how: int, *, mode: str = "a") -> IO[str]:
    """The file of lock `key`, opened by `mode` and locked; who closes it frees it.

    Raises:
        BlockingIOError: another process holds it, and `how` says not to wait.
    """
    path = file_of(where, key)
    if mode == "a":
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with ExitStack() as unless_it_is_ours:
            file = unless_it_is_ours.enter_context(path.open(mode))
            fcntl.flock(file, how)
            # `delete` may have come between opening and lock: whoever is next opens a new file, and both would go on
            if is_at(path, file):
                unless_it_is_ours.pop_all()
                return file


def is_at(path: Path, file: IO[str]) -> bool:
    """Whether `file`, which is open, is still what `path` names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def delete(where: Project, key: str) -> None:
    """Delete the file of lock `key`, unless a process holds it. Who waits for it meanwhile takes a new one."""
    with if_free(where, key) as free:
        if free:
            file_of(where, key).unlink()


def file_of(where: Project, key: str) -> Path:
    return where.state / "locks" / f"{key}.lock"


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
