"""`longlora up`: Prefect's server, a worker, and MLflow's server, kept up together until one of them is lost or we are interrupted.

They listen on 127.0.0.1, or where the user says, if it is known who may come (tasks/access.py).
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tasks.access import MLFLOW, PREFECT, Access, mlflow_server, must_be_asked, prefect_server
from tasks.daemon import RestartingServer
from tasks.listening import LOCAL, LOOPBACK, Host, listening, must_be_free
from tasks.locks import hold, is_held
from tasks.servers import UP, is_local_tracking, local_tracking, must_be_reachable, prefect_command, without_proxy
from tasks.workspace import Project

SERVERS = (
    (PREFECT, "--prefect-port", "PREFECT_API_URL", 4200),
    (MLFLOW, "--mlflow-port", "MLFLOW_TRACKING_URI", 5000),
)
"""Each with the option and the variable that say where it is, and its own usual port."""
POOL = "local"  # the work pool of prefect.yaml
# flow runs of one worker: those that were due while none was up, up to a hundred of a schedule, would all begin in one moment
AT_ONCE = 8


@dataclass(frozen=True)
class Up:
    """A server that `up` runs."""

    server: RestartingServer
    page: str
    """Its address, and what to do there, for people."""
    near: str
    """The address of its interface, from this machine."""
    access: Access | None

    def ready(self) -> None:
        """Wait until it answers, and see that it asks for credentials, if there are any.

        Raises:
            ValueError: it ended, was not ready in time, or lets anybody in.
        """
        self.server.ready()
        if self.access and self.access.words():
            self.access.must_guard(self.near)


def up(
    where: Project,
    *,
    host: str,
    prefect_port: int | None,
    mlflow_port: int | None,
    ready: Callable[[Host, list[Up]], None],
) -> None:
    """Run Prefect's server, a worker of its work pool, and MLflow's server, until one of them ends or we are interrupted.

    MLflow's is started again first, some times: clients outlast that, and what the worker runs does not need it. `ready` is called
    once, with the servers that answer. What the user has elsewhere (PREFECT_API_URL, MLFLOW_TRACKING_URI) is not started.

    Raises:
        ValueError: no such host, other machines would be let in unasked, unsound credentials, a port is taken, named twice, or of a
            server that is not started, the servers are up already, or one ended.
    """
    if is_held(where, UP):  # before its ports are found taken
        raise ValueError(f"`longlora up` runs already for {where.root}: end that one first")
    at = listening(host)
    ours = {PREFECT: "PREFECT_API_URL" not in os.environ, MLFLOW: is_local_tracking(where)}
    if at.wide:
        must_be_asked(host, [each for each, own in ours.items() if own])
    asked = {PREFECT: prefect_port, MLFLOW: mlflow_port}
    ports: dict[Access, int] = {}
    for each, option, variable, usual in SERVERS:
        port = asked[each]
        if ours[each]:
            ports[each] = usual if port is None else port
        elif port is not None:
            raise ValueError(
                f"{option} {port}: {variable} is set, so {each.server} is not started here: leave one of them out"
            )
    for each, option, *_ in SERVERS:
        if each in ports:
            must_be_free(at, ports[each], option)
            each.must_be_sound()
    if len(ports) > len({*ports.values()}):
        raise ValueError(
            f"--mlflow-port {ports[MLFLOW]}: is --prefect-port too, and each server needs a port of its own"
        )
    with hold(where, UP):
        run_servers(where, ports, at, ready=ready)


def run_servers(where: Project, ports: dict[Access, int], at: Host, *, ready: Callable[[Host, list[Up]], None]) -> None:
    """The servers that have a port in `ports`, and a worker; the rest as `up`."""
    without_proxy(at.near.strip("[]"))
    announced = where.state / "prefect.url"
    ours: list[Up] = []
    try:
        if PREFECT in ports:
            ours.append(start_prefect(where, at, ports[PREFECT]))
            os.environ["PREFECT_API_URL"] = ours[0].near
        else:
            must_be_reachable("PREFECT_API_URL")
        if MLFLOW in ports:
            ours.append(start_mlflow(where, at, ports[MLFLOW]))
        for each in ours:
            each.ready()
        worker = start_worker(where)
        worker.ready()
        if PREFECT in ports:  # another's address may hold a password, and is the user's to hand on
            announced.write_text(os.environ["PREFECT_API_URL"])
        ready(at, ours)
        ours.append(worker)
        while not any(each.server.lost for each in ours):
            time.sleep(0.5)
        raise ValueError(next(each.server.lost for each in ours if each.server.lost))
    finally:
        announced.unlink(missing_ok=True)
        for each in reversed(ours):  # the worker first: what it runs still has a server to tell
            each.server.close()


def start_prefect(where: Project, at: Host, port: int) -> Up:
    near = f"http://{at.near}:{port}/api"
    command = prefect_command(port, schedules=True, host=at)
    # its page asks the server that the page is from, whatever the browser calls it
    env = {"PREFECT_API_URL": near, "PREFECT_UI_API_URL": "/api", **prefect_server(at, port)}
    log = where.state / "prefect.log"
    server = RestartingServer("Prefect", command, health=f"{near}/health", log=log, env=env, restarts=0)
    return Up(server, f"http://{at.shown}:{port}", near, PREFECT)


def start_mlflow(where: Project, at: Host, port: int) -> Up:
    near, guard = f"http://{at.near}:{port}", mlflow_server(where.state / "access", port)
    command = mlflow_command(where, port, host=at, guarded=bool(guard))
    env = {**guard, **mlflow_names(at, port)}
    server = RestartingServer("MLflow", command, health=f"{near}/health", log=where.state / "mlflow.log", env=env)
    # Its pages show traces and prompts until the switch is used, which the browser then keeps. With the kind of page in the address
    # the switch seems used, keeps nothing, and the next click leads to traces.
    return Up(
        server, f"http://{at.shown}:{port} (its switch *Model training*, top left, leads to the runs)", near, MLFLOW
    )


def start_worker(where: Project) -> Up:
    server = RestartingServer("the worker", worker_command(), health="", log=where.state / "worker.log", restarts=0)
    return Up(server, "", "", None)


def worker_command() -> list[str]:
    limit = ["--limit", str(AT_ONCE)]
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", *limit]


def mlflow_command(where: Project, port: int, *, host: Host = LOCAL, guarded: bool = False) -> list[str]:
    """MLflow's server on the project's own store; `guarded`: it asks for credentials."""
    files = ["--default-artifact-root", (where.state / "mlartifacts").as_uri()]
    store = ["--backend-store-uri", local_tracking(where), *files]
    guard = ["--app-name", "basic-auth"] if guarded else []
    listen = ["--host", host.address, "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *listen, *store, *guard]


def mlflow_names(host: Host, port: int) -> dict[str, str]:
    """What MLflow's server may be called in a browser; it refuses other names, against pages that point theirs at our address."""
    tunnels = ["localhost:*", f"{LOOPBACK}:*", "[[]::1]:*"]  # patterns of fnmatch: [[] is a bracket
    known = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*tunnels, *(f"{name}:{port}" for name in host.names())]),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in host.names()),
    }
    return {} if host == LOCAL else {name: os.environ.get(name, value) for name, value in known.items()}
