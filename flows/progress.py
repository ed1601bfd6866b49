"""How far a training stage is, by the lines that it prints (longlora/training/history.py): for Prefect's page while it runs.

A line also has speed and memory, which differ between equal runs and are in no file: here they become curves for MLflow.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

LINE = re.compile(r"step (?P<step>\d+)/(?P<steps>\d+)  loss \S+  (?P<pace>[\d,]+) tokens/s  .*left  (?P<memory>\S+) GB")
EVERY = 5.0  # seconds between two requests to Prefect

Point = tuple[str, float, int]
"""A name, its value, and the step."""


class Progress:
    """Of one stage; call it where its task runs."""

    def __init__(self, stage: str, curve: str) -> None:
        """`curve`: the name of the curve whose steps these are."""
        self.stage, self.curve, self.points = stage, curve, list[Point]()
        # a thread of its own: who reads the stage's output does not wait for Prefect
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._context = copy_context()  # an artifact belongs to the task that runs here
        self._percent, self._said, self._shown = 0.0, "", ""
        self._artifact: UUID | None = None
        self._look: Future[None] | None = None
        self._due = 0.0

    def hear(self, line: str) -> None:
        """Learn from `line`, if it tells of a step."""
        if found := LINE.fullmatch(line):
            step = int(found["step"])
            self._percent, self._said = 100 * step / int(found["steps"]), line
            self.points += [
                (f"{self.curve}/tokens_per_second", float(found["pace"].replace(",", "")), step),
                (f"{self.curve}/memory_gb", float(found["memory"]), step),
            ]

    def show(self) -> None:
        """Have Prefect show the newest line, if the last request is some time ago."""
        if time.monotonic() >= self._due and (self._look is None or self._look.done()):
            self._send()

    def end(self, log: Callable[[str], None]) -> None:
        """Show the last line; what kept Prefect from showing it is said to `log`, for a stage does not fail by that."""
        self._send()
        self._thread.shutdown()
        if self._look and (error := self._look.exception()):
            log(f"its progress is not on Prefect's page: {error}")

    def _send(self) -> None:
        if self._said != self._shown:
            self._look = self._thread.submit(self._context.run, self._tell, self._percent, self._said)
            self._shown, self._due = self._said, time.monotonic() + EVERY

    def _tell(self, percent: float, said: str) -> None:
        text = f"{self.stage}: {said}"
        if self._artifact is None:
            # its type has what Prefect gives where a loop runs, too; here none does
            self._artifact = create_progress_artifact(  # pyright: ignore[reportAttributeAccessIssue]
                percent, description=text
            )
        else:
            update_progress_artifact(self._artifact, percent, description=text)
