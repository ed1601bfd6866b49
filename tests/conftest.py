"""Projects and servers that tests share. Every test gets real git, DVC, MLflow and Prefect, on folders of its own."""

import http.server
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import dummy
import pytest

os.environ.update(dummy.ENV)


# Before a test module brings absl (by rouge-score): Prefect's import closes the log handlers there are, and absl's pytest's stderr.
if importlib.util.find_spec("prefect"):
    importlib.import_module("prefect.main")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dummy project, committed, never run."""
    return dummy.make(tmp_path_factory.mktemp("template") / "dummy")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A clone of the dummy project."""
    dummy.git(tmp_path, "clone", "--quiet", str(template), "dummy")
    return tmp_path / "dummy"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a small training can run, with a checkpoint folder of its own."""
    import training  # torch is not needed by every test

    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "checkpoints"))
    training.prepare(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database; to make one takes four seconds, so tests share it and use names of their own."""
    return dummy.mlflow_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server with its scheduler; ends with the session."""
    from tasks import access, daemon, servers
    from tasks.listening import LOCAL, LOOPBACK

    home = tmp_path_factory.mktemp("prefect")
    port, log = servers.free_port(), home / "server.log"
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_UI_API_URL": "/api",  # as `longlora up` has it: the page asks the server that it is from
        **access.prefect_server(LOCAL, port),
        "DO_NOT_TRACK": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        server = daemon.start(servers.prefect_command(port, schedules=True), log)
    try:
        daemon.wait_for(f"http://{LOOPBACK}:{port}/api/health", server, log)
        yield f"http://{LOOPBACK}:{port}/api"
    finally:
        daemon.stop(server)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A project whose runs have keys of their own, so that tests can share an MLflow store."""
    (folder / "own").write_text(str(tmp_path))
    dummy.commit(folder)
    return folder


@pytest.fixture
def environment(prefect_url: str, mlflow_uri: str) -> dict[str, str]:
    return {"PREFECT_API_URL": prefect_url, "MLFLOW_TRACKING_URI": mlflow_uri}


@pytest.fixture
def run_flow(own, environment, monkeypatch):
    """The flow, called in this process: to import Prefect and MLflow once saves ten seconds a test."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.pipeline import pipeline

    monkeypatch.chdir(own)
    for name, value in {**environment, "PREFECT_HOME": str(own / ".longlora" / "prefect")}.items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
        yield pipeline


@pytest.fixture
def listener() -> Iterator[tuple[list[dict], str]]:
    """A local web server; the requests it got, and its address. It refuses what comes to /no."""
    got: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(500 if self.path.startswith("/no") else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield got, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def heard(listener, monkeypatch) -> list[dict]:
    """What the webhook is told."""
    got, address = listener
    monkeypatch.setenv("LONGLORA_HOOK_URL", f"{address}/hook")
    return got
