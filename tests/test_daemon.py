"""A server that ends is started again; a run whose server cannot be kept up ends, leaves nothing, and goes on when told to."""

import queue
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from uuid import uuid4

import dummy
import psutil
import pytest
from test_pipeline import key_of, mlflow_runs, read_until, start
from test_supervise import wait_until_gone

pytestmark = pytest.mark.slow
SLOW = ["train.seconds=0.5", "train.steps=8"]
ANSWERS = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def pid_at(address: str, *, but: int = 0) -> int:
    """The id of the process that answers, once it is another than `but`."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2) as reply:
                pid = int(reply.read())
        except OSError:
            pid = but
        if pid != but:
            return pid
        assert time.monotonic() < deadline, f"nobody new answers at {address}"
        time.sleep(0.05)


def test_a_full_disk_is_told_once_and_a_folder_that_is_gone_is_none(tmp_path, monkeypatch):
    from tasks import daemon

    monkeypatch.setattr(daemon, "PAUSE", 0.01)
    room, over, said = iter([daemon.ROOM, FileNotFoundError(), daemon.ROOM - 1, 0]), threading.Event(), []

    def usage(folder):
        left = next(room)
        if isinstance(left, OSError):
            raise left
        return SimpleNamespace(free=left)

    monkeypatch.setattr(daemon.shutil, "disk_usage", usage)
    daemon.watch_room(tmp_path, over=over, on_full=said.append)
    assert said == [f"No space left on device: {tmp_path}"]
    over.set()
    daemon.watch_room(tmp_path, over=over, on_full=said.append)
    assert len(said) == len(list(room)) == 1


def test_a_killed_server_comes_back_at_its_address_and_none_is_left_behind(tmp_path, capfd):
    from tasks.daemon import RestartingServer
    from tasks.servers import free_port

    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    server = RestartingServer(
        "the server", [sys.executable, "-c", ANSWERS, str(port)], health=address, log=tmp_path / "log"
    )
    server.ready()
    first = pid_at(address)
    psutil.Process(first).kill()
    second = pid_at(address, but=first)
    psutil.Process(second).parent().kill()  # its supervisor: the server itself stays, on the port, until it is swept
    third = pid_at(address, but=second)
    server.close()
    assert capfd.readouterr().err.count("the server ended, and is started again") == 2
    assert not any(psutil.pid_exists(pid) for pid in (first, second, third))
    assert not server.lost


@pytest.fixture
def watched(tmp_path):
    """A function that starts a server that runs some code, and watches it; the files of its starts and what it says at its end."""
    from tasks.daemon import RestartingServer

    starts, said, servers = tmp_path / "starts", queue.SimpleQueue(), []

    def watch(code: str, *, restarts: int):
        note = f"import time; print(time.monotonic(), file=open({str(starts)!r}, 'a'), flush=True); {code}"
        (tmp_path / "state").mkdir()
        log = tmp_path / "state" / "log"
        command = [sys.executable, "-c", note]
        server = RestartingServer("the server", command, health="", log=log, restarts=restarts, on_lost=said.put)
        servers.append(server)
        server.ready()
        return server

    yield watch, lambda: [float(line) for line in starts.read_text().splitlines()] if starts.exists() else [], said
    for server in servers:
        server.close()


def wait_until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_was_up_for_long_has_all_its_restarts_again(watched, monkeypatch):
    from tasks import daemon

    watch, starts, said = watched
    monkeypatch.setattr(daemon, "PAUSE", 0.01)
    monkeypatch.setattr(daemon, "STEADY", 0.0)  # whatever it is up for is long
    server = watch("", restarts=1)
    wait_until(lambda: len(starts()) > 3)
    assert not server.lost
    monkeypatch.setattr(daemon, "STEADY", 300.0)
    assert said.get(timeout=20).startswith("the server ended 2 times: ")
    assert server.lost


def test_a_server_that_ends_at_once_is_started_again_after_a_pause_which_grows(watched, monkeypatch):
    from tasks import daemon

    watch, starts, said = watched
    monkeypatch.setattr(daemon, "PAUSE", 0.5)
    watch("", restarts=2)
    said.get(timeout=20)
    first, second, third = starts()
    assert second - first > 0.5 and third - second > 1.0


def test_a_server_that_is_closed_while_it_waits_to_be_started_again_is_not(watched, monkeypatch):
    from tasks import daemon

    watch, starts, said = watched
    monkeypatch.setattr(daemon, "PAUSE", 60.0)
    threads = threading.active_count()
    server = watch("", restarts=1)
    wait_until(lambda: server._process.poll() is not None)
    server.close()
    wait_until(lambda: threading.active_count() == threads)
    assert (len(starts()), said.empty(), server.lost) == (1, True, "")


def test_a_server_that_cannot_be_started_again_is_lost(watched, monkeypatch, tmp_path):
    from tasks import daemon

    watch, _, said = watched
    monkeypatch.setattr(daemon, "PAUSE", 0.01)
    server = watch("input()", restarts=1)
    shutil.rmtree(tmp_path / "state")
    server._process.kill()
    assert said.get(timeout=20).startswith("the server ended, and cannot be started again: [Errno 2] ")
    assert server.lost


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('a tip', flush=True); input()", "was not ready in 0.5 s (what it said: "),
        ("print('no such port', flush=True)", "did not start: no such port (all of it: "),
        (
            "print('Error: no database\\n(Background on this error at: here)\\n\\nERROR:    Application startup failed.')\n"
            "print('Server stopped!', flush=True)",
            "did not start: Error: no database (all of it: ",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_told_from_one_that_ended(tmp_path, monkeypatch, code, said):
    from tasks import daemon
    from tasks.servers import free_port

    monkeypatch.setattr(daemon, "STARTUP", 0.5 if "input" in code else 60.0)
    log, url = tmp_path / "log", f"http://127.0.0.1:{free_port()}/"
    server = daemon.start([sys.executable, "-c", code], log)
    try:
        with pytest.raises(ValueError, match=f"^the server for {url} ") as caught:
            daemon.wait_for(url, server, log)
    finally:
        daemon.stop(server)
    assert said in str(caught.value)


def test_a_run_that_is_interrupted_at_its_very_end_still_waits_for_its_server_to_end(folder, monkeypatch):
    from tasks import servers
    from tasks.workspace import project

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(servers, "flush", interrupted)
    monkeypatch.setattr(servers, "prefect_command", lambda port, **_: [sys.executable, "-c", ANSWERS, str(port)])
    where = project(folder)
    where.state.mkdir()
    others = psutil.Process().children(recursive=True)
    with pytest.raises(KeyboardInterrupt), servers.prefect_api(where):
        children = [each for each in psutil.Process().children(recursive=True) if each not in others]
    assert children and not any(child.is_running() for child in children)


def test_up_starts_mlflow_again_so_many_times_and_then_ends_all_with_one_line(folder, monkeypatch):
    from tasks import daemon, servers, up
    from tasks.access import MLFLOW
    from tasks.listening import LOCAL
    from tasks.workspace import project

    port, killed = servers.free_port(), []
    monkeypatch.setenv("PREFECT_API_URL", f"http://lab:amber-lantern-62@127.0.0.1:{port}/")
    monkeypatch.setattr(up, "must_be_reachable", lambda variable: None)
    monkeypatch.setattr(up, "mlflow_command", lambda *_, **__: [sys.executable, "-c", ANSWERS, str(port)])
    monkeypatch.setattr(up, "worker_command", lambda: [sys.executable, "-c", "input()"])

    def kill() -> None:
        for _ in range(4):
            killed.append(pid_at(f"http://127.0.0.1:{port}/", but=killed[-1] if killed else 0))
            psutil.Process(killed[-1]).kill()

    where = project(folder)
    where.state.mkdir()
    others = psutil.Process().children()
    killer = threading.Thread(target=kill)
    monkeypatch.setattr(daemon, "PAUSE", 0.1)

    def ready(at: object, ours: object) -> None:
        assert not (where.state / "prefect.url").exists()  # it is not ours to announce, and holds a password
        killer.start()

    with pytest.raises(ValueError, match="^MLflow ended 4 times: "):
        up.run_servers(where, {MLFLOW: port}, LOCAL, ready=ready)
    killer.join()
    assert len(killed) == 4
    assert psutil.Process().children() == others


def prefects(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The Prefect server that a run has started for itself, its supervisor apart."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "prefect server start" in words and "supervise.py" not in words:
            found.append(child)
    return found


def test_a_run_whose_prefect_server_is_killed_goes_on_with_another(folder, mlflow_uri):
    (folder / "own").write_text(str(folder))
    dummy.commit(folder)
    process = start(folder, {"MLFLOW_TRACKING_URI": mlflow_uri}, *SLOW)
    read_until(process, "train | step 2")
    (server,) = prefects(process)
    server.kill()
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    # Prefect's own words, if it had something to send in the seconds without a server; no line's end after the second
    lost = "--- Error logging to API ---\nAll connection attempts failed"
    assert [line for line in error.replace(lost, "").splitlines() if "EventsWorker" not in line] == [
        f"Prefect's server ended, and is started again (what it said: {folder}/.longlora/prefect.log)"
    ]
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key_of(folder, *SLOW))] == ["FINISHED"]
    with sqlite3.connect(folder / ".longlora" / "prefect" / "prefect.db") as database:
        assert database.execute("select state_type from flow_run").fetchall() == [("COMPLETED",)]


def test_a_run_whose_prefect_server_can_not_be_kept_up_ends_and_can_be_resumed(folder, mlflow_uri):
    (folder / "own").write_text(str(folder))
    dummy.commit(folder)
    slow = ["train.seconds=0.5", "train.steps=30"]
    process = start(folder, {"MLFLOW_TRACKING_URI": mlflow_uri}, *slow)
    read_until(process, "train | step 2")
    killing = time.monotonic()

    def kill_all() -> None:
        with suppress(psutil.NoSuchProcess):  # it has ended between two looks
            while process.poll() is None:
                for each in prefects(process):
                    each.kill()
                time.sleep(0.1)

    threading.Thread(target=kill_all, daemon=True).start()
    _, error = process.communicate(timeout=120)
    assert time.monotonic() - killing < 60
    assert process.returncode not in (0, None)
    (said,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: Prefect's server ended 4 times: ")
    assert said.endswith("; the same command again goes on from here")
    assert "Traceback" not in error
    key = key_of(folder, *slow)
    wait_until_gone(folder / ".longlora" / "worktrees" / key, 5)
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["KILLED"]

    again = start(folder, {"MLFLOW_TRACKING_URI": mlflow_uri}, *slow)
    _, error = again.communicate(timeout=200)
    assert (again.returncode, error) == (0, "")
    assert dummy.executions(folder).count("fetch base") == 1
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["FINISHED"]


RECORDER = """
from pathlib import Path
from tasks.servers import use_environment
from tasks.workspace import project
use_environment(project(Path.cwd()))
from prefect.settings import get_current_settings
recorder = get_current_settings().server.services.task_run_recorder
print(recorder.batch_size > 1, recorder.flush_interval <= 1)
"""


def test_a_server_gathers_what_it_records_of_tasks_but_not_for_long(folder):
    command, env = [sys.executable, "-c", RECORDER], dummy.clean_environment()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_a_cancel_is_seen_though_the_server_was_away_and_one_client_is_made_for_all_looks(monkeypatch):
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import Cancelling, Running

    from flows import cancelling

    run = FlowRun(flow_id=uuid4())
    made, looks, sent = [], [], []

    class Server(BaseHTTPRequestHandler):
        protocol_version, state = "HTTP/1.1", Running()

        def do_GET(self) -> None:
            body = run.model_copy(update={"state": self.state}).model_dump_json().encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            looks.append(self.state.name)

        def log_message(self, *_: object) -> None: ...

    def serve(port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), Server)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        return server

    get_client = cancelling.get_client
    monkeypatch.setattr(cancelling, "get_client", lambda **how: made.append(how) or get_client(**how))
    monkeypatch.setattr(cancelling, "LOOK", 0.05)
    monkeypatch.setattr(cancelling.supervise, "interrupt", lambda: None)
    monkeypatch.setattr(cancelling.os, "kill", lambda process, number: sent.append(number))
    cancelled, over = threading.Event(), threading.Event()
    first = serve(0)
    url = f"http://127.0.0.1:{first.server_port}/api"
    looking = threading.Thread(target=cancelling.watch, args=(run.id, url, cancelled, over), daemon=True)
    looking.start()
    wait_until(lambda: len(looks) > 1)
    Server.protocol_version = "HTTP/1.0"  # what is open is closed after its next answer
    first.shutdown()
    first.server_close()
    time.sleep(0.3)  # looks that nobody answers
    Server.state = Cancelling()
    second = serve(first.server_port)
    looking.join(30)
    over.set()
    second.shutdown()
    second.server_close()
    assert sent == [signal.SIGTERM] and cancelled.is_set()
    assert looks[-1] == "Cancelling" and len(made) == 1
