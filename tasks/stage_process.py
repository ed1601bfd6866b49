"""Running one stage: a process that waits for its name, a slot of the GPUs if it needs one, and what it said when it failed."""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from tasks import supervise
from tasks.errors import UserError
from tasks.single import AFRESH, CAUSE
from tasks.slots import Slots
from tasks.supervise import Child

LOOK = 0.5  # seconds between two looks whether a slot is free


class StageError(UserError):
    """A stage did not end well. The message is what the stage said last."""


class ParameterError(StageError):
    """The stage refused its parameters (status 2): to try again is of no use."""


class InterruptedStageError(StageError):
    """The run was told to end."""


class StageRunner:
    """Runs stages of one worktree, each in a process that was started before. Its calls may come from several threads."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str], afresh: bool) -> None:
        """`environment`: what stages are told beyond their files; `afresh`: run what is known too, and cache nothing."""
        self._folder = folder
        self._environment = {**stage_environment(), **environment}
        self._command = [sys.executable, "-P", "-m", "tasks.single", *([AFRESH] if afresh else [])]
        self._spare: tuple[Child, Slots] | None = None
        self._spare_lock = threading.RLock()
        self._closed = False

    def run(self, name: str, *, queues: bool, on_line: Callable[[str], None], on_tick: Callable[[], None]) -> None:
        """Run one stage, as a supervised process, its output given to `on_line`; `queues`: once it has a slot of the GPUs.

        Raises:
            StageError: it ended with an error; `ParameterError` if it refused its parameters, `InterruptedStageError` if
                `close` was called.
        """
        said: list[str] = []

        def hear(line: str) -> None:
            if line:
                said.append(line)
                del said[:-50]
                on_line(line)

        with self._spare_lock:  # until it is taken, or another thread takes it and this stage is passed over
            self.warm()
            spare, self._spare = self._spare, None
        self.warm()
        status = 0
        if spare:
            child, slots = spare
            with closing(slots), closing(child):
                if queues:
                    self._wait_for_slot(name, slots, hear)
                status = child.run(name, on_line=hear, on_tick=on_tick)
        if self._closed or supervise.interrupted:
            raise InterruptedStageError(f"stage '{name}': interrupted")
        if status:
            kind = ParameterError if status == 2 else StageError
            raise kind(f"stage '{name}': {cause(said, status)}")

    def _wait_for_slot(self, name: str, slots: Slots, say: Callable[[str], None]) -> None:
        """Take a slot; says whom it waits for.

        Raises:
            InterruptedStageError: the run was told to end meanwhile.
        """
        said = ""
        while taken := slots.take(f"stage '{name}' of {self._folder} (process {os.getpid()})"):
            if self._closed or supervise.interrupted:
                raise InterruptedStageError(f"stage '{name}': interrupted")
            if taken != said:
                say(f"waiting: {taken}")
                said = taken
            time.sleep(LOOK)

    def warm(self) -> None:
        """Have a process ready that waits for a stage's name: it imports DVC while we, or the stage before, do something else."""
        with self._spare_lock:
            if not (self._spare or self._closed or supervise.interrupted):
                slots = Slots()
                child = Child(self._command, cwd=self._folder, env=self._environment, handles=slots.handles())
                self._spare = child, slots

    def close(self) -> None:
        """Start nothing any more, and end the process that is waiting; `supervise.stop_all` ends those at work."""
        with self._spare_lock:
            self._closed = True
            spare, self._spare = self._spare, None
        if spare:
            for each in spare:
                each.close()


def stage_environment() -> dict[str, str]:
    """Ours without what is the orchestrator's: a stage needs no server, and no key to one. torchrun waits for its workers, when it
    is told to end, as long as we wait for it. What a stage prints is passed on by the line, so progress bars are off: only their
    ends would be seen.

    Raises:
        ValueError: LONGLORA_GRACE is no number of seconds.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(supervise.grace()), "TQDM_DISABLE": "1", **ours}


def cause(said: list[str], status: int) -> str:
    """The stage's own last word."""
    errors = [line for line in said if line.startswith(CAUSE)]
    if errors:
        return errors[-1].removeprefix(CAUSE)
    return said[-1] if said else f"ended with status {status}"
