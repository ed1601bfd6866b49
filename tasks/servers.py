"""Prefect's and MLflow's servers: where they are, and starting them on this machine.

What the user set in the environment is left alone. Otherwise everything lives in the project's state folder, and listens on
127.0.0.1 only. A server started here ends with the process that started it.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tasks.daemon import Kept, answers, last_line, start, stop, wait_for
from tasks.workspace import Project

HOST = "127.0.0.1"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}  # of the addresses that name a server
POOL = "local"  # the work pool of prefect.yaml


def use_environment(where: Project) -> None:
    """Set what Prefect, MLflow and DVC read from the environment, where the user has not. Call it before importing them."""
    home = where.state / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # what its server says when its sqlite is busy; nothing was changed then
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the flow prints for the terminal itself
        "MLFLOW_TRACKING_URI": local_tracking(where),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes instead of 9
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "DVC_NO_ANALYTICS": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)
    # a proxy of the user's must not be asked for our own servers
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [known, HOST, "localhost"]))


def local_tracking(where: Project) -> str:
    """The address of the project's own MLflow database."""
    return f"sqlite:///{where.state / 'mlflow.db'}"


def is_local_tracking(where: Project) -> bool:
    return os.environ.get("MLFLOW_TRACKING_URI") == local_tracking(where)


def is_served(address: str) -> bool:
    """Whether an MLflow server stands between us and the database; without one, where files go is ours to say."""
    return urlsplit(address).scheme in ("http", "https")


@contextmanager
def prefect_api(where: Project) -> Iterator[Callable[[], None]]:
    """A Prefect server for the time of one run: the user's, one that `longlora up` runs, else one of our own.

    Yields a function that waits until it is ready, so that the caller can import Prefect (two seconds) while it starts.
    """
    known = found_prefect(where)
    if known:
        os.environ["PREFECT_API_URL"] = known
        yield lambda: None
        return
    port, log = free_port(), where.state / "prefect.log"
    server = Kept(
        "Prefect's server", prefect_command(port, schedules=False), health=f"http://{HOST}:{port}/api/health", log=log
    )
    os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    try:
        yield server.ready
    finally:
        if not server.lost:
            flush()
        del os.environ["PREFECT_API_URL"]
        server.close()


def found_prefect(where: Project) -> str | None:
    """The address of the user's Prefect server, or of the one that `longlora up` runs.

    Raises:
        ValueError: PREFECT_API_URL is set, and nobody answers there.
    """
    if "PREFECT_API_URL" in os.environ:
        must_be_reachable("PREFECT_API_URL")
        return os.environ["PREFECT_API_URL"]
    announced = where.state / "prefect.url"
    url = announced.read_text().strip() if announced.exists() else ""
    return url if url and answers(f"{url}/health") else None


def running_prefect(where: Project) -> str:
    """`found_prefect`, or a ValueError that says what to do."""
    url = found_prefect(where)
    if not url:
        raise ValueError("no Prefect server is up: start one with `longlora up`, or set PREFECT_API_URL")
    return url


def flush() -> None:
    """Have Prefect send what it still holds back: logs, and the events by which the server knows task runs."""
    if "prefect.flows" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def prefect_command(port: int, *, schedules: bool) -> list[str]:
    scheduling = [] if schedules else ["--no-scheduler", "--no-late-runs", "--no-ui"]
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port), *scheduling]


def worker_command() -> list[str]:
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]


def mlflow_command(where: Project, port: int) -> list[str]:
    """MLflow's server on the project's own store."""
    files = ["--default-artifact-root", (where.state / "mlartifacts").as_uri()]
    store = ["--backend-store-uri", local_tracking(where), *files]
    return [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", *store]


@dataclass(frozen=True)
class Up:
    """A server that `up` runs."""

    name: str
    page: str
    health: str
    process: "subprocess.Popen[bytes]"
    log: Path


def up(where: Project, *, prefect_port: int, mlflow_port: int, ready: Callable[[list[Up]], None]) -> None:
    """Run Prefect's server, a worker of its work pool, and MLflow's server, until one of them ends or we are interrupted.

    `ready` is called once, with the servers that answer. What the user has elsewhere (PREFECT_API_URL, MLFLOW_TRACKING_URI) is
    not started.

    Raises:
        ValueError: a port is taken, or a server ended.
    """
    announced = where.state / "prefect.url"
    ours: list[Up] = []
    try:
        if "PREFECT_API_URL" not in os.environ:
            page, log = f"http://{HOST}:{must_be_free(prefect_port, '--prefect-port')}", where.state / "prefect.log"
            os.environ |= {"PREFECT_API_URL": f"{page}/api", "PREFECT_UI_API_URL": f"{page}/api"}
            server = start(prefect_command(prefect_port, schedules=True), log)
            ours.append(Up("Prefect", page, f"{page}/api/health", server, log))
        if is_local_tracking(where):
            page, log = f"http://{HOST}:{must_be_free(mlflow_port, '--mlflow-port')}", where.state / "mlflow.log"
            server = start(mlflow_command(where, mlflow_port), log)
            ours.append(Up("MLflow", page, f"{page}/health", server, log))
        for each in ours:
            wait_for(each.health, each.process, each.log)
        log = where.state / "worker.log"
        worker = Up("the worker", "", "", start(worker_command(), log), log)
        announced.write_text(os.environ["PREFECT_API_URL"])
        ready(ours)
        ours.append(worker)
        while all(each.process.poll() is None for each in ours):
            time.sleep(0.5)
        ended = next(each for each in ours if each.process.poll() is not None)
        raise ValueError(f"{ended.name} ended: {last_line(ended.log)} (all of it: {ended.log})")
    finally:
        announced.unlink(missing_ok=True)
        for each in reversed(ours):  # the worker first: what it runs still has a server to tell
            stop(each.process)


def must_be_free(port: int, option: str) -> int:
    if not 0 < port < 65536:
        raise ValueError(f"{option} {port}: must be 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ValueError(f"port {port} is taken: end what listens there, or choose another with {option}") from None
    return port


def must_be_reachable(variable: str) -> None:
    """Check that somebody listens at the address in environment variable `variable`, if it names a server.

    Raises:
        ValueError: nobody does. Without this, clients try again for minutes.
    """
    url = urlsplit(os.environ[variable])
    port = url.port or PORTS.get(url.scheme.partition("+")[0])  # postgresql+psycopg2: what stands behind + is a driver
    if not url.hostname or not port:
        return
    try:
        socket.create_connection((url.hostname, port), timeout=10).close()
    except OSError as error:
        where = f"{url.scheme}://{url.hostname}:{url.port or ''}".rstrip(":")
        raise ValueError(f"nobody answers at {where} ({error}): start it, or change {variable}") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
