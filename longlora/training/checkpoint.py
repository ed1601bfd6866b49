"""Where checkpoints lie: found only by the run they belong to, which is alone with them.

They lie outside the stage's outputs, which DVC deletes before every attempt, in a folder named by a digest of all that
determines the result: a retry resumes, a changed parameter or line of code never resumes from a foreign checkpoint. Tested: a
run that was cut off anywhere ends with the bytes of one that was not. Two runs may want the same training at the same time: one
waits.
"""

import ast
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

import torch

from longlora.parallel.ranks import any_of
from longlora.section import Section

LIBRARY = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft")
LOOK = 1.0  # seconds between two looks at a lock


def digest(inputs: list[Path], *, sections: tuple[Section, ...]) -> str:
    """A name for all that determines the result: the sections, every byte of the inputs, and the code."""
    said = [[s.model_dump() for s in sections], [f"{package} {version(package)}" for package in PACKAGES]]
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    files = sorted(f for folder in inputs for f in folder.rglob("*") if f.is_file())
    for file in [*sorted(code_of(Path(__file__).with_name("fit.py"))), *files]:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def code_of(file: Path) -> set[Path]:
    """`file` and what it imports of this library, directly or not. Read from the files: which modules a process has loaded
    besides differs from one that trains alone to one of several."""
    names = {
        name
        for n in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(n, ast.ImportFrom) and n.module
        for name in (n.module, *(f"{n.module}.{alias.name}" for alias in n.names))
    }
    own = [LIBRARY.parent.joinpath(*n.split(".")).with_suffix(".py") for n in names if n.startswith(f"{LIBRARY.name}.")]
    return {file}.union(*(code_of(other) for other in own if other.is_file()))


def checkpoint_folder(name: str) -> Path:
    """Outside the stage's outputs, which DVC deletes before every attempt."""
    return Path(os.environ.get("LONGLORA_CHECKPOINTS") or ".longlora/checkpoints") / name


@contextmanager
def checkpoint_lock(checkpoints: Path, *, first: bool, device: torch.device) -> Generator[None]:
    """Hold the exclusive lock of `checkpoints`; says so if that takes waiting. The `first` process locks, all of them wait.

    The kernel frees the lock when its holder dies, however it dies. It is looked at again and again, and all are told each
    time: processes that waited for the first one in a single exchange would give up after half an hour.
    """
    if first:
        checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.with_name(f"{checkpoints.name}.lock").open("a") if first else nullcontext() as file:
        said = False
        while any_of(file is not None and not locked(file), device=device):
            if file and not said:
                print(f"waiting: another run trains the same (it holds {file.name})", flush=True)
                said = True
            time.sleep(LOOK)
        yield


def locked(file: TextIOWrapper) -> bool:
    """Whether `file` could be locked; its closing frees it.

    Raises:
        ValueError: its file system has no locks, as Lustre has none where it is mounted without them.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{file.name}: {error.strerror}: checkpoints need a file system with locks (Lustre: mounted with flock), such as one "
            "that LONGLORA_CHECKPOINTS names"
        ) from None
    return True


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def latest(checkpoints: Path) -> Path | None:
    return max(checkpoints.glob("checkpoint-*"), key=checkpoint_step, default=None)


def discard(checkpoints: Path) -> None:
    """Delete them all. Whoever is killed amid it leaves none that `latest` would take for whole."""
    for whole in sorted(checkpoints.glob("checkpoint-*"), key=checkpoint_step):
        whole.rename(whole.with_name(f"partial-{checkpoint_step(whole)}"))
    shutil.rmtree(checkpoints, ignore_errors=True)
