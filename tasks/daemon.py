"""A server as a child process: started, waited for, kept up, stopped.

A client of Prefect's tries each request again for a minute, and sends each of many events for seven seconds: a run whose server
is gone does not fail, it stands still for minutes. But clients outlast a restart. So the server that a run started for itself is
started again when it ends, at the same address and on the same database; if that does not help, the run is told to end. MLflow's
server of `longlora up` is started again likewise.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from tasks import supervise
from tasks.web import request

STARTUP = 120.0  # seconds; about 6 on an idle machine
RESTARTS = 3  # of one server, in quick succession
STEADY = 300.0  # seconds; a server that was up this long gets all its restarts back: `up` runs for weeks
ROOM = 500_000  # bytes; sqlite writes a page and its journal with less, and no run's next state
PAUSE = 1.0  # seconds before the first restart, twice as many before each that follows: what ended it may pass
# what Prefect's server says after the cause of its end
PARTING = re.compile(r"Server stopped!|ERROR: +Application startup failed|\(Background on this error at: ")
LAST_WORDS = 20.0  # seconds, beyond the stage's own, that a run whose server is lost has to tell MLflow so


class RestartingServer:
    """A server that is started again when it ends, once it was ready and until it is closed."""

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        health: str,
        log: Path,
        env: dict[str, str] | None = None,
        restarts: int = RESTARTS,
        on_lost: Callable[[str], None] = lambda said: None,
    ) -> None:
        """`health`: the address that answers when it is ready, '' if there is none; `on_lost` is told when it ended for good."""
        self.name, self.lost = name, ""  # what to say once it ended for good
        self._command, self._health, self._log, self._env = command, health, log, env or {}
        self._restarts, self._on_lost = restarts, on_lost
        self._mark = Path(f"{log}:{os.getpid()}")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._process = self._start()

    def ready(self) -> None:
        """Wait until it answers, and watch it from now on.

        Raises:
            ValueError: it ended, or was not ready in time.
        """
        if self._health:
            wait_for(self._health, self._process, self._log)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        stop(self._process)

    def _start(self) -> "subprocess.Popen[bytes]":
        return start(self._command, self._log, env={**self._env, supervise.MARK: str(self._mark)})

    def _watch(self) -> None:
        try:
            lost = self._kept_up()
        except OSError as error:  # no disk, no memory, no process to be had
            lost = f"{self.name} ended, and cannot be started again: {error}"
        if lost:
            self.lost = lost
            self._on_lost(lost)

    def _kept_up(self) -> str:
        """Start it again whenever it ends; what to say once it did so too often, or '' when it is closed."""
        again, since = 0, time.monotonic()
        while True:
            self._process.wait()
            if time.monotonic() - since > STEADY:
                again = 0
            if self._closed.wait(PAUSE * 2**again if again < self._restarts else 0):
                return ""
            if again == self._restarts:
                times = f" {again + 1} times" if again else ""
                return f"{self.name} ended{times}: {last_line(self._log)} (all of it: {self._log})"
            with self._lock:
                if self._closed.is_set():
                    return ""
                said = f"{self.name} ended, and is started again (what it said: {self._log})"
                print(said, file=sys.stderr, flush=True)
                supervise.sweep(self._mark)  # if only its supervisor was killed, it still has the port
                self._process = self._start()
            again, since = again + 1, time.monotonic()


def watch_room(folder: Path, *, over: threading.Event, on_full: Callable[[str], None]) -> None:
    """Tell `on_full` once the disk of `folder` is full, until `over`: the server's answers are errors then, and a run would stand
    still while its clients try again, as if the server were gone."""
    while not over.wait(PAUSE):
        with suppress(OSError):  # a share that stumbles, or a folder that is gone, is no full disk
            if shutil.disk_usage(folder).free < ROOM:
                on_full(f"No space left on device: {folder}")
                return


def end_run(said: str) -> None:
    """End this process, whose server is gone for good."""
    print(f"error: {said}; the same command again goes on from here", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # whoever is told to end leaves no child, and tells MLflow
    time.sleep(supervise.grace() + LAST_WORDS)
    os._exit(1)  # Prefect would go on telling the server, at the flow's end and at the interpreter's


def start(command: list[str], log: Path, *, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a server that ends when we do; what it prints goes to `log`."""
    supervisor = [sys.executable, str(Path(__file__).with_name("supervise.py"))]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*supervisor, *command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def stop(server: "subprocess.Popen[bytes]") -> None:
    assert server.stdin
    server.stdin.close()
    server.wait()


def wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until `url` answers.

    Raises:
        ValueError: the server ended (its last line), or was not ready in time.
    """
    deadline = time.monotonic() + STARTUP
    while not answers(url):
        if server.poll() is not None:
            raise ValueError(f"the server for {url} did not start: {last_line(log)} (all of it: {log})")
        if time.monotonic() > deadline:
            raise ValueError(f"the server for {url} was not ready in {STARTUP:g} s (what it said: {log})")
        time.sleep(0.1)


def last_line(log: Path) -> str:
    """The last one that tells of a cause."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not PARTING.match(line)), "it said nothing")


def answers(url: str) -> bool:
    try:
        return request("GET", url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
