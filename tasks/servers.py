"""Prefect's and MLflow's servers: where they are, and a Prefect server for the time of one run (tasks/up.py keeps both up).

What the user set in the environment is left alone. Otherwise everything lives in the project's state folder, and listens on
127.0.0.1. A server started here ends with the process that started it.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from tasks.access import MLFLOW, PREFECT, prefect_server
from tasks.daemon import RESTARTS, STARTUP, RestartingServer, answers, end_run, watch_room
from tasks.listening import LOCAL, LOOPBACK, Host
from tasks.locks import is_held
from tasks.workspace import Project

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}  # of the addresses that name a server
UP = "up"  # the lock of who runs a project's servers
reached: set[tuple[str, int]] = set()  # host and port of servers that answered this process


def use_environment(where: Project) -> None:
    """Set what Prefect, MLflow and DVC read from the environment, where the user has not. Call it before importing them."""
    home = where.state / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # its clients would start a server of their own where they are told of none
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the newer page asks amplitude.com for its settings, whatever stands above
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # or it takes them for registered once a server came by that registers none (`prefect_api`), and its page offers none
        "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # what its server says when its sqlite is busy; nothing was changed then
        # a server that writes every event at once does so just when the next task asks for its tags' slots: sqlite is busy, and
        # the task waits for two seconds
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
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
        os.environ[name] = os.environ.get(name) or value  # set to '' it is as good as unset, here and below
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.pop("PREFECT_API_URL", None)
    # whole, for DVC's engine changes the current folder while MLflow opens it again
    address = os.environ["MLFLOW_TRACKING_URI"]
    if (database := address.removeprefix("sqlite:///")) != address:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(database).absolute()}"
    take_password_out()
    without_proxy(LOOPBACK, "localhost")


def take_password_out() -> None:
    """Give MLflow's client the user and password that stand in its server's address by their own variables: it names the address
    in its errors, which go to terminals, logs, hooks and Prefect's page.

    Raises:
        ValueError: only one of them stands there, which no variable takes.
    """
    url, _ = address_in("MLFLOW_TRACKING_URI")
    if is_served(url.geturl()) and "@" in url.netloc:
        if not (url.username and url.password):
            raise ValueError(
                "MLFLOW_TRACKING_URI: has a user or a password alone: give both, by MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or a token by MLFLOW_TRACKING_TOKEN"
            )
        os.environ["MLFLOW_TRACKING_URI"] = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        if not MLFLOW.words():
            os.environ |= dict(zip(MLFLOW.variables, map(unquote, (url.username, url.password)), strict=True))


def without_proxy(*hosts: str) -> None:
    """Have no proxy of the user's asked for our own servers."""
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [known, *hosts]))


def local_tracking(where: Project) -> str:
    """The address of the project's own MLflow database."""
    return f"sqlite:///{where.state / 'mlflow.db'}"


def is_local_tracking(where: Project) -> bool:
    return os.environ.get("MLFLOW_TRACKING_URI") == local_tracking(where)


def is_served(address: str) -> bool:
    """Whether an MLflow server stands between us and the database; without one, where files go is ours to say."""
    return urlsplit(address).scheme in ("http", "https")


@contextmanager
def prefect_api(
    where: Project, *, restarts: int = RESTARTS, on_lost: Callable[[str], None] = end_run
) -> Generator[Callable[[], None]]:
    """A Prefect server for the time of one run: the user's, one that `longlora up` runs, else one of our own, which is started
    again `restarts` times; `on_lost` is told when it ended for good.

    Yields a function that waits until it is ready, so that the caller can import Prefect (two seconds) while it starts.
    """
    known = found_prefect(where)
    if known:
        os.environ["PREFECT_API_URL"] = known
        yield lambda: None
        return
    port, log = free_port(), where.state / "prefect.log"
    server = RestartingServer(
        "Prefect's server",
        prefect_command(port, schedules=False),
        health=f"http://{LOOPBACK}:{port}/api/health",
        log=log,
        # kinds of blocks are for Prefect's pages, which this server does not show
        env={"PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false", **prefect_server(LOCAL, port)},
        restarts=restarts,
        on_lost=on_lost,
    )
    os.environ["PREFECT_API_URL"] = f"http://{LOOPBACK}:{port}/api"
    over = threading.Event()
    threading.Thread(
        target=watch_room, args=(where.state,), kwargs={"over": over, "on_full": on_lost}, daemon=True
    ).start()
    try:
        yield server.ready
    finally:
        over.set()
        try:
            if not server.lost:
                flush()
        finally:  # a second Ctrl-C, or a signal that came late
            del os.environ["PREFECT_API_URL"]
            server.close()


def found_prefect(where: Project) -> str | None:
    """The address of the user's Prefect server, or of the one that `longlora up` runs.

    Raises:
        ValueError: PREFECT_API_URL is set, and nobody answers there; or it does not let us in.
    """
    if "PREFECT_API_URL" in os.environ:
        must_be_reachable("PREFECT_API_URL")
        return os.environ["PREFECT_API_URL"]
    announced = where.state / "prefect.url"
    # one that was killed could not take its word back, and another project's server may be there by now
    url = announced.read_text().strip() if is_held(where, UP) and announced.exists() else ""
    if not url or not answers(f"{url}/health"):
        return None
    PREFECT.must_admit(url)
    without_proxy(str(urlsplit(url).hostname))
    return url


def running_prefect(where: Project) -> str:
    """`found_prefect`, or a ValueError that says what to do."""
    url = found_prefect(where)
    if not url:
        raise ValueError("no Prefect server is up: start one with `longlora up`, or set PREFECT_API_URL")
    return url


def flush() -> None:
    """Have Prefect send what it still holds back: logs, and the events by which the server knows task runs."""
    if "prefect.events.worker" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def prefect_command(port: int, *, schedules: bool, host: Host = LOCAL) -> list[str]:
    scheduling = [] if schedules else ["--no-scheduler", "--no-late-runs", "--no-ui"]
    where = ["--host", host.address, "--port", str(port)]
    # who sends credentials is no page of somebody else's, and may know the server by any name
    guard = [] if PREFECT.words() else ["tasks.guard"]
    return [sys.executable, "-m", *guard, "prefect", "server", "start", *where, *scheduling]


def must_be_reachable(variable: str) -> None:
    """Check that somebody listens at the address in environment variable `variable`, if it names a server, and lets us in.

    One that did so before in this process, a run mostly, may be starting again: it has as long as a start may take.

    Raises:
        ValueError: nobody does, or not us; or it is no address. Without this, clients try again for minutes.
    """
    url, port = address_in(variable)
    port = port or PORTS.get(url.scheme.partition("+")[0])  # postgresql+psycopg2: what stands behind + is a driver
    if not url.hostname or not port:
        return
    deadline = time.monotonic() + (STARTUP if (url.hostname, port) in reached else 0)
    server = PREFECT if variable == "PREFECT_API_URL" else MLFLOW
    where = f"{url.scheme}://{url.hostname}:{url.port or ''}".rstrip(":")
    told = False
    while True:
        try:
            socket.create_connection((url.hostname, port), timeout=10).close()
            break
        except OSError as error:
            if time.monotonic() < deadline:
                if not told:
                    print(f"waiting for {server.server} at {where}", flush=True)
                told = True
                time.sleep(0.5)
                continue
            raise ValueError(f"nobody answers at {where} ({error}): start it, or change {variable}") from None
    reached.add((url.hostname, port))
    if is_served(os.environ[variable]):
        server.must_admit(os.environ[variable])


def address_in(variable: str) -> tuple[SplitResult, int | None]:
    """The address in environment variable `variable`, and its port; its password does not end it too soon.

    Raises:
        ValueError: it does, as one with / ? # or [ may. The words of the parser would hold a part of it.
    """
    try:
        url = urlsplit(os.environ[variable])
        found = None if url.netloc and "@" in url.path + url.fragment else (url, url.port)
    except ValueError:
        found = None
    if not found:
        raise ValueError(f"{variable} is no address that can be read: percent-encode the password in {variable}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
