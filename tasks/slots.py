"""Slots of this machine's GPUs: stages that dvc.yaml tags `gpu` queue on them, of whatever run and project of a user they are.

A stage needs a slot of every GPU that it would see; where there is none, trainings share the CPUs, and queue on those. A slot is a
file that is locked, so that the kernel frees it. The stage's supervisor has it too: after a SIGKILL of the run the slot is free
when the stage's processes are gone, and not before. By UUID, so jobs of a scheduler that were given other GPUs do not wait.
"""

import fcntl
import os
import socket
from functools import cache
from pathlib import Path
from typing import TextIO

from tasks.machine import visible_gpus

SLOTS = "LONGLORA_GPU_SLOTS"


class Slots:
    """All slots there are, opened for one stage; none is taken yet."""

    def __init__(self) -> None:
        """
        Raises:
            ValueError: LONGLORA_GPU_SLOTS is no number, or there is no place for the files.
        """
        folder, wanted = Path.home() / ".cache" / "longlora" / "slots", count()
        try:
            if wanted:
                folder.mkdir(parents=True, exist_ok=True)
            self._files = {
                place: [(folder / f"{place}.{n}").open("a+") for n in range(wanted)]
                for place in (places() if wanted else [])
            }
        except OSError as error:
            raise ValueError(
                f"{folder}: {error.strerror}, so stages can not queue: {SLOTS}=0 runs them at once"
            ) from None

    def handles(self) -> list[int]:
        """What a process needs to have the slots as long as it lives, once they are taken."""
        return [file.fileno() for files in self._files.values() for file in files]

    def take(self, who: str) -> str:
        """Take one of each place's slots, for `who`: '' if that was possible, else what has one that is missing."""
        taken: list[TextIO] = []
        for place, files in self._files.items():
            free = next((file for file in files if locked(file)), None)
            if free is None:
                for file in taken:
                    fcntl.flock(file, fcntl.LOCK_UN)
                files[0].seek(0)
                return f"{place} is taken by {files[0].read() or 'another stage'}"
            taken.append(free)
        for file in taken:
            file.truncate(0)
            file.write(who)
            file.flush()
        return ""

    def close(self) -> None:
        """Give back what is taken, unless a process that has the handles lives."""
        for files in self._files.values():
            for file in files:
                file.close()


def locked(file: TextIO) -> bool:
    """Lock `file`, if nobody else has.

    Raises:
        ValueError: its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{file.name}: {error.strerror}, so stages can not queue: {SLOTS}=0 runs them at once"
        ) from None
    return True


def count() -> int:
    """Slots of a GPU, by LONGLORA_GPU_SLOTS; 0: nothing queues.

    Raises:
        ValueError: that is no number.
    """
    said = os.environ.get(SLOTS, "1")
    if not said.isdecimal():
        raise ValueError(f"{SLOTS}={said}: must be a whole number, 0 for no queue")
    return int(said)


@cache  # nvidia-smi takes a second
def places() -> list[str]:
    """The UUIDs of the GPUs that a process sees, in an order that all have; without one, this machine's CPUs."""
    try:
        found = {uuid for uuid, _ in visible_gpus()}
    except LookupError:  # parts of a GPU, which are named by their own UUIDs
        found = {word.strip().replace("/", "-") for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",")}
    return sorted(found) or [f"cpu-{socket.gethostname()}"]  # a home may be on a network
