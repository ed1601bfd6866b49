"""MLflow's part of a run, in a thread of its own: stages do not wait for it, nor for the five seconds that importing it takes.

Nothing is lost by that: all of it is in files, and is sent again when the run is run again.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

# Before there are threads: it makes a class of both Sequence and Mapping, and whoever asks in that moment whether a list is a
# Mapping is told so, then and ever after (CPython's ABCMeta answers for a half-made class with its first base's memory).
import pyarrow  # noqa: F401  # pyright: ignore[reportUnusedImport]

from flows.run_dir import RunDir
from tasks.errors import UserError, one_line
from tasks.servers import must_be_reachable
from tasks.stages import Out

if TYPE_CHECKING:
    from flows.progress import Point
    from tasks.tracking import Tracker

EVERY = 5.0  # seconds between two looks at a curve


class NotOpenedError(UserError):
    """MLflow does not take the run."""


class MlflowWriter:
    """What goes to MLflow, in the order of the calls. A failure to send is raised by `wait`, and nothing is sent after it but how
    the run ended: where MLflow is gone, its client tries each time for minutes."""

    def __init__(self, run_dir: RunDir) -> None:
        """Raises ValueError if nobody answers at MLFLOW_TRACKING_URI."""
        must_be_reachable("MLFLOW_TRACKING_URI")
        self.uri = os.environ["MLFLOW_TRACKING_URI"]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._wanted = Event()  # to import MLflow would delay the first stage
        self._opened = self._thread.submit(self._open, run_dir)
        self._sent: list[Future[None]] = []
        self._failure: Exception | None = None
        self._look: Future[None] | None = None
        self._due = 0.0

    def _open(self, run_dir: RunDir) -> "Tracker":
        self._wanted.wait()
        # Prefect's many short calls would each wait for 5 ms, the default, while five seconds of modules are imported
        sys.setswitchinterval(5e-4)
        return open_tracker(run_dir)

    def follow(self, outs: list[Out], points: "Sequence[Point]" = ()) -> None:
        """Send what is new in `outs`' curves and among `points`, if the last look is some time ago. Call it while a stage runs.

        Raises:
            NotOpenedError: MLflow refused the run, which hours of training would not mend.
        """
        self._wanted.set()
        if self._opened.done() and (error := self._opened.exception()):
            raise NotOpenedError(f"MLflow: {one_line(error)}") from error
        if time.monotonic() >= self._due and (self._look is None or self._look.done()):
            told = list(points)
            self._look = self._thread.submit(
                lambda: None if self._failure else self._opened.result().follow(outs, told)
            )
            self._due = time.monotonic() + EVERY

    def points(self, points: "Sequence[Point]") -> None:
        """Send those of `points` that are new."""
        self._send(lambda tracker: tracker.follow([], points))

    def stage(self, name: str, outs: list[Out]) -> None:
        """Send all that a finished stage has to show."""
        self._send(lambda tracker: tracker.stage(name, outs))

    def summary(self, text: str, picture: str, tags: dict[str, str]) -> None:
        """Send the run's description with its main picture, and tags."""
        self._send(lambda tracker: tracker.describe(text, picture))
        self._send(lambda tracker: tracker.tag(tags))

    def _send(self, send: "Callable[[Tracker], None]") -> None:
        def work() -> None:
            if self._failure:
                raise self._failure
            try:
                send(self._opened.result())
            except Exception as error:
                self._failure = error
                raise

        self._sent.append(self._thread.submit(work))

    def wait(self) -> str:
        """Wait until all is sent; the MLflow run's id."""
        self._wanted.set()
        for sent in self._sent:
            sent.result()
        return self._opened.result().run_id

    def finish(self, status: str) -> None:
        """End the MLflow run as FINISHED, FAILED or KILLED. One that was not opened has no end, as `wait` says."""
        self._wanted.set()
        if not self._opened.exception():
            self._thread.submit(self._opened.result().finish, status).result()
        self._thread.shutdown()


def open_tracker(run_dir: RunDir) -> "Tracker":
    """The MLflow run of the key of `run_dir`, the machine watched."""
    from tasks import tracking

    tracker = tracking.Tracker(
        tracking.connect(), run_dir.where, run_dir.snapshot, experiment=run_dir.name, folder=run_dir.folder
    )
    tracker.watch()
    return tracker
