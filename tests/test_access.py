"""Servers that other machines may reach ask who comes: real ones are started, and asked with and without credentials."""

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dummy
import httpx
import psutil
import pytest
from test_pipeline import key_of, mlflow_runs, start

from tasks import access, daemon, listening, servers
from tasks.access import MLFLOW, PREFECT
from tasks.guard import Guard
from tasks.up import up as bring_servers_up
from tasks.workspace import Project

STRING, USER, PASSWORD = "ada:violet-harbour-51", "ada", "amber-lantern-62"
CREDENTIALS = {
    "PREFECT_API_AUTH_STRING": STRING,
    "MLFLOW_TRACKING_USERNAME": USER,
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
}
FORMER = "former-password-73"  # of the same user, when the server was last up
SECRETS = [
    word
    for words in (STRING, f"{USER}:{PASSWORD}")
    for word in (words.partition(":")[2], base64.b64encode(words.encode()).decode())
]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without addresses and credentials."""
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_")):
            monkeypatch.delenv(name)
    return monkeypatch


def set_all(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        patch.setenv(name, value)


# --- what is refused before anything starts


def bring_up(folder: Path, patch: pytest.MonkeyPatch, host: str) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a server was started")

    patch.setattr(daemon, "start", start)
    where = Project(folder, folder)
    patch.setenv("MLFLOW_TRACKING_URI", servers.local_tracking(where))
    ports = {"prefect_port": servers.free_port(), "mlflow_port": servers.free_port()}
    bring_servers_up(where, host=host, **ports, ready=lambda *_: None)


def test_one_port_for_two_servers_is_refused_before_one_takes_it_from_the_other(clean, tmp_path):
    same = servers.free_port()
    clean.setattr(servers, "free_port", lambda: same)
    with pytest.raises(ValueError, match=f"^--mlflow-port {same}: is --prefect-port too"):
        bring_up(tmp_path, clean, "127.0.0.1")


@pytest.mark.parametrize(
    ("variable", "option"), [("PREFECT_API_URL", "--prefect-port"), ("MLFLOW_TRACKING_URI", "--mlflow-port")]
)
def test_the_port_of_a_server_that_is_elsewhere_is_refused(clean, tmp_path, variable, option):
    where, port = Project(tmp_path, tmp_path), servers.free_port()
    clean.setenv("MLFLOW_TRACKING_URI", servers.local_tracking(where))
    clean.setenv(variable, "http://127.0.0.1:9")
    ports = {"prefect_port": None, "mlflow_port": None, f"{option[2:-5]}_port": port}
    server = "Prefect" if variable.startswith("PREFECT") else "MLflow"
    said = f"^{option} {port}: {variable} is set, so {server} is not started here: leave one of them out$"
    with pytest.raises(ValueError, match=said):
        bring_servers_up(where, host="127.0.0.1", **ports, ready=lambda *_: None)


def test_an_address_that_is_set_to_nothing_is_none(clean, tmp_path):
    where, before = Project(tmp_path, tmp_path), dict(os.environ)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_HOME"):
        clean.setenv(name, "")
    try:
        servers.use_environment(where)
        assert servers.is_local_tracking(where)
        assert os.environ["PREFECT_HOME"] == str(where.state / "prefect")
        assert servers.found_prefect(where) is None
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "192.0.2.7"])
def test_without_credentials_nothing_is_started_where_others_may_come(clean, tmp_path, host):
    with pytest.raises(ValueError, match="other machines may reach it, so credentials are needed") as refusal:
        bring_up(tmp_path, clean, host)
    assert all(name in str(refusal.value) for name in CREDENTIALS)
    assert list(tmp_path.iterdir()) == []


def test_one_server_s_credentials_are_not_enough(clean, tmp_path):
    set_all(clean, {"PREFECT_API_AUTH_STRING": STRING, "MLFLOW_TRACKING_USERNAME": USER})
    with pytest.raises(ValueError, match=r"set MLFLOW_TRACKING_PASSWORD$"):
        bring_up(tmp_path, clean, "0.0.0.0")


def test_a_server_that_is_elsewhere_needs_no_credentials_of_ours(clean):
    access.must_be_asked("0.0.0.0", [])
    clean.setenv("PREFECT_API_AUTH_STRING", STRING)
    access.must_be_asked("0.0.0.0", [PREFECT])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"PREFECT_API_AUTH_STRING": "violet-harbour-51"}, "PREFECT_API_AUTH_STRING: must be user:password"),
        ({"PREFECT_API_AUTH_STRING": ":violet-harbour-51"}, "PREFECT_API_AUTH_STRING: must be user:password"),
        ({"PREFECT_API_AUTH_STRING": "ada:short"}, "has 5 characters, and must have 12 or more"),
        ({"PREFECT_API_AUTH_STRING": "ada:violet-harböur"}, "must be printable ASCII"),
        ({"PREFECT_API_AUTH_STRING": f"{STRING}\n"}, "must be printable ASCII"),
        ({"PREFECT_SERVER_API_AUTH_STRING": "other"}, "PREFECT_SERVER_API_AUTH_STRING is not PREFECT_API_AUTH_STRING"),
        ({"MLFLOW_TRACKING_USERNAME": "a:b"}, "a user's name without ':', and a password"),
        ({"MLFLOW_TRACKING_USERNAME": ""}, "a user's name without ':', and a password"),
        ({"MLFLOW_TRACKING_PASSWORD": "eleven-char"}, "has 11 characters, and must have 12 or more"),
        ({"MLFLOW_TRACKING_PASSWORD": "password1234"}, "everybody knows it"),
    ],
)
def test_unsound_credentials_are_refused_on_loopback_too_and_not_repeated(clean, tmp_path, changed, said):
    set_all(clean, {**CREDENTIALS, **changed})
    with pytest.raises(ValueError) as refusal:
        bring_up(tmp_path, clean, "127.0.0.1")
    assert said in str(refusal.value)
    assert not any(secret in str(refusal.value) for secret in [*SECRETS, "violet", "eleven-char"])


@pytest.mark.parametrize(
    ("host", "address", "wide", "near", "shown"),
    [
        ("127.0.0.1", "127.0.0.1", False, "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", False, "127.0.0.1", "localhost"),
        ("127.1", "127.0.0.1", False, "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", False, "[::1]", "[::1]"),
        ("0.0.0.0", "0.0.0.0", True, "127.0.0.1", None),
        ("::", "::", True, "[::1]", None),
        ("192.0.2.7", "192.0.2.7", True, "192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7", True, "[2001:db8::7]", "[2001:db8::7]"),
    ],
)
def test_an_address_is_bound_reached_and_shown_as_it_should_be(host, address, wide, near, shown):
    import socket

    at = listening.listening(host)
    assert (at.address, at.wide, at.near, at.shown) == (address, wide, near, shown or socket.gethostname())
    assert {at.near, at.shown} <= set(at.names())


def test_a_name_is_judged_by_the_address_it_stands_for(monkeypatch):
    def found(*address: str) -> Any:
        return lambda *_, **__: [(0, 0, 0, "", (each, 0)) for each in address]

    monkeypatch.setattr(listening.socket, "getaddrinfo", found("2001:db8::7", "192.0.2.7"))
    at = listening.listening("lab.example.org")
    assert (at.address, at.wide, at.shown) == ("192.0.2.7", True, "lab.example.org")
    monkeypatch.setattr(listening.socket, "getaddrinfo", found("127.0.1.1"))
    assert not listening.listening("lab.example.org").wide


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "must be an IP address or a name of this machine"),
        ("http://lab", "must be an IP address or a name of this machine"),
        ("a..b", "must be an IP address or a name of this machine"),
        ("127.0.0.1:4200", "must be an IP address or a name of this machine"),
        ("fe80::1%lo", "name a plain address"),
        ("::ffff:127.0.0.1", "name a plain address"),
    ],
)
def test_what_is_no_address_is_refused(host, said):
    with pytest.raises(ValueError, match=said):
        listening.listening(host)


def test_an_address_of_another_machine_and_a_taken_port_are_told_apart():
    elsewhere = listening.Host("192.0.2.77", "192.0.2.77")
    with pytest.raises(ValueError, match="this machine has no address 192.0.2.77"):
        listening.must_be_free(elsewhere, servers.free_port(), "--prefect-port")
    with listening.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken"):
            listening.must_be_free(listening.LOCAL, port, "--prefect-port")


# --- what MLflow's server is told


def test_mlflow_s_users_are_made_anew_and_nobody_else_reads_them(clean, tmp_path):
    import configparser

    folder = tmp_path / "100% ours"
    assert access.mlflow_server(folder, 5000) == {} and not folder.exists()
    set_all(clean, CREDENTIALS)
    old = os.umask(0)
    try:
        first = access.mlflow_server(folder, 5000)
        (folder / "mlflow-5000.db").write_text("former users")
        second = access.mlflow_server(folder, 5000)
    finally:
        os.umask(old)
    assert (folder / "mlflow-5000.db").read_bytes() == b""
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())] == ["0o700", "0o600", "0o600"]
    config = configparser.ConfigParser()
    config.read(second["MLFLOW_AUTH_CONFIG_PATH"])
    assert config["mlflow"]["database_uri"] == f"sqlite:///{folder}/mlflow-5000.db"
    assert config["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    key = "MLFLOW_FLASK_SERVER_SECRET_KEY"
    assert len(first[key]) == 64 and first[key] != second[key]


# --- a client before it begins


class Seen(NamedTuple):
    url: str
    asked: list[tuple[str, str | None]]


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[Seen]:
    """A server that answers `request.param`, a status, to anybody."""
    asked: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(request.param)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Seen(f"http://127.0.0.1:{server.server_port}", asked)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("stub", [401], indirect=True)
def test_who_is_not_let_in_is_told_which_variables_to_set(clean, stub):
    for server, variables in ((PREFECT, PREFECT.variables[0]), (MLFLOW, " and ".join(MLFLOW.variables))):
        with pytest.raises(ValueError) as refusal:
            server.must_admit(stub.url)
        assert str(refusal.value) == f"{server.server} at {stub.url} asks for credentials: set {variables}"
    set_all(clean, CREDENTIALS)
    for server, variables in ((PREFECT, PREFECT.variables[0]), (MLFLOW, " and ".join(MLFLOW.variables))):
        with pytest.raises(ValueError) as refusal:
            server.must_admit(stub.url)
        assert str(refusal.value) == f"{server.server} at {stub.url} does not take the credentials in {variables}"
    assert [header for _, header in stub.asked] == [
        None,
        None,
        *(f"Basic {base64.b64encode(each.encode()).decode()}" for each in (STRING, f"{USER}:{PASSWORD}")),
    ]


@pytest.mark.parametrize("stub", [401], indirect=True)
def test_who_has_another_way_in_is_left_to_try_it(clean, stub):
    clean.setenv("MLFLOW_TRACKING_TOKEN", "token")
    clean.setenv("PREFECT_API_KEY", "key")
    MLFLOW.must_admit(stub.url)
    PREFECT.must_admit(stub.url)
    assert stub.asked == []


@pytest.mark.parametrize("stub", [404], indirect=True)
def test_where_prefect_s_interface_is_not_the_rule_is_said_and_mlflow_s_client_may_know_better(clean, stub):
    clean.setenv("PREFECT_API_URL", f"{stub.url.replace('//', '//ada:violet-harbour@')}/page")
    with pytest.raises(ValueError) as refusal:
        servers.must_be_reachable("PREFECT_API_URL")
    assert str(refusal.value) == f"Prefect does not answer at {stub.url}/page: its address must end in /api"
    MLFLOW.must_admit(stub.url)


@pytest.mark.parametrize("stub", [200, 302, 500], indirect=True)
def test_any_other_answer_is_the_client_s_to_judge_and_credentials_follow_no_redirection(clean, stub):
    set_all(clean, CREDENTIALS)
    PREFECT.must_admit(f"{stub.url}/api/")
    assert [path for path, _ in stub.asked] == ["/api/admin/version"]


@pytest.mark.parametrize("stub", [200, 401], indirect=True)
def test_a_server_of_ours_that_lets_anybody_in_or_us_out_is_not_kept(clean, stub):
    set_all(clean, CREDENTIALS)
    with pytest.raises(ValueError, match="Prefect does not keep others out"):
        PREFECT.must_guard(stub.url)


@pytest.mark.parametrize("stub", [200], indirect=True)
def test_an_announced_server_counts_while_up_runs_and_a_second_up_leaves_it(clean, stub, tmp_path):
    where, announced = Project(tmp_path, tmp_path), tmp_path / ".longlora" / "prefect.url"
    dummy.write(announced, stub.url)
    assert servers.found_prefect(where) is None  # `up` was killed; another project's may answer there
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout.readline() == "held\n"
        assert servers.found_prefect(where) == stub.url
        with pytest.raises(ValueError, match=f"^`longlora up` runs already for {tmp_path}: end that one first$"):
            taken = int(stub.url.split(":")[2].split("/")[0])  # as by the first one, and another port would not help
            bring_servers_up(where, host="127.0.0.1", prefect_port=taken, mlflow_port=taken, ready=lambda *_: None)
        up.kill()
    assert announced.exists()


HOLDER = """
import sys, time
from pathlib import Path
from tasks.servers import UP
from tasks.locks import hold
from tasks.workspace import Project
with hold(Project(Path(sys.argv[1]), Path(sys.argv[1])), UP):
    print("held", flush=True)
    time.sleep(60)
"""


# --- real servers


class Served(NamedTuple):
    folder: Path
    prefect: str
    mlflow: str
    said: list[str]

    def clients(self, **changed: str) -> dict[str, str]:
        """The environment of a client: addresses and credentials, or others."""
        return {"PREFECT_API_URL": self.prefect, "MLFLOW_TRACKING_URI": self.mlflow, **CREDENTIALS, **changed}


@pytest.fixture(scope="module")
def served(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`longlora up --host 0.0.0.0` with credentials, in a dummy project where MLflow's user had another password."""
    folder = tmp_path_factory.mktemp("served") / "dummy"
    dummy.git(folder.parent, "clone", "--quiet", str(template), "dummy")
    dummy.write(folder / "prefect.yaml", (Path(__file__).parent.parent / "prefect.yaml").read_text())
    dummy.commit(folder)
    ports = [str(servers.free_port()), str(servers.free_port())]
    leave_a_former_password(folder / ".longlora" / "access" / f"mlflow-{ports[1]}.db")
    command = [str(Path(sys.executable).with_name("longlora")), "up", "--host", "0.0.0.0"]
    up = subprocess.Popen(
        [*command, "--prefect-port", ports[0], "--mlflow-port", ports[1]],
        cwd=folder,
        env={**dummy.clean_environment(), **CREDENTIALS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=0,
    )
    assert up.stdout and up.stderr
    try:
        said = [up.stdout.readline() for _ in range(4)]
        assert all(said), up.stderr.read()
        yield Served(folder, f"http://127.0.0.1:{ports[0]}/api", f"http://127.0.0.1:{ports[1]}", said)
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
    assert searched(folder) == []  # once more: what was still in memory is on the disk


def leave_a_former_password(users: Path) -> None:
    make = "import sys; from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Store; s = Store()\n"
    make += "s.init_db(sys.argv[1]); s.create_user(*sys.argv[2:], is_admin=True)"
    users.parent.mkdir(parents=True)
    env = dummy.clean_environment()
    subprocess.run([sys.executable, "-c", make, f"sqlite:///{users}", USER, FORMER], env=env, check=True)


def status(url: str, words: str = "", body: dict[str, Any] | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    request.add_header("content-type", "application/json")
    if words:
        request.add_header("Authorization", f"Basic {base64.b64encode(words.encode()).decode()}")
    try:
        with urllib.request.urlopen(request) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def asks_for_leave(prefect: str, origin: str) -> int:
    """The status by which Prefect's server says whether scripts of a page from `origin` may give it work."""
    asking = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    address = f"{prefect}/deployments/{uuid.uuid4()}/create_flow_run"
    return httpx.options(address, headers=asking, trust_env=False).status_code


def searched(folder: Path) -> list[str]:
    """Files and git objects of `folder` that hold a secret."""
    words = [secret.encode() for secret in SECRETS]
    files = [str(path) for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in words)]
    names = dummy.git(folder, "cat-file", "--batch-check=%(objectname)", "--batch-all-objects").splitlines()
    return files + [n for n in names if any(secret in dummy.git(folder, "cat-file", "-p", n) for secret in SECRETS)]


def commands() -> set[str]:
    """The command lines of all processes, as `ps` shows them."""
    found = set()
    for process in psutil.process_iter():
        try:
            found.add(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_both_servers_answer_only_those_they_know(served):
    wrong = "ada:wrong-password-84"
    for address, body in (
        (f"{served.prefect}/admin/version", None),
        (f"{served.prefect}/admin/settings", None),
        (f"{served.prefect}/flow_runs/filter", {}),
        (f"{served.prefect}/logs/filter", {}),
    ):
        assert [status(address, words, body) for words in ("", wrong, STRING)] == [401, 401, 200], address
    for address in (
        f"{served.mlflow}/",
        f"{served.mlflow}/version",
        f"{served.mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
        f"{served.mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=1",
    ):
        known, former = f"{USER}:{PASSWORD}", f"{USER}:{FORMER}"
        assert [status(address, words) for words in ("", wrong, former, known)] == [401, 401, 401, 200], address
    port = served.mlflow.rpartition(":")[2]
    for own in set(listening.listening("0.0.0.0").names()) - {listening.socket.gethostname()}:
        assert status(f"http://{own}:{port}/version") == 401
        assert status(f"http://{own}:{port}/version", f"{USER}:{PASSWORD}") == 200
    assert status(f"{served.mlflow}/get-artifact?path=x&run_uuid=y") == 401
    assert status(f"{served.mlflow}/graphql", body={"query": "{}"}) == 401
    assert (status(f"{served.prefect}/health"), status(f"{served.mlflow}/health")) == (200, 200)


@pytest.mark.slow
def test_prefect_s_live_logs_and_events_are_told_to_nobody_unknown(served):
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    def first_word(path: str, token: str | None) -> str:
        try:
            with connect(served.prefect.replace("http", "ws") + path, subprotocols=["prefect"]) as socket:
                socket.send(json.dumps({"type": "auth", "token": token}))
                return json.loads(socket.recv(timeout=20))["type"]
        except WebSocketException:
            return "closed"

    for path in ("/events/out", "/logs/out"):
        assert [first_word(path, token) for token in (None, "ada:wrong", STRING)] == [
            "closed",
            "closed",
            "auth_success",
        ]


@pytest.mark.slow
def test_no_page_of_another_site_gives_an_open_server_work_nor_reads_its_logs(prefect_url):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    own, other = prefect_url.removesuffix("/api"), "http://other.example.org"
    port = own.rpartition(":")[2]

    def answers(**headers: str) -> int:  # without a content type a browser asks nobody for leave
        return httpx.post(
            f"{prefect_url}/flows/", content=b'{"name": "x"}', headers=headers, trust_env=False
        ).status_code

    assert {answers(), answers(Origin=own), answers(Origin=own.replace("127.0.0.1", "localhost"))} <= {200, 201}
    assert answers(Origin="http://localhost:9", Host="localhost:9") in (200, 201)  # through a tunnel
    assert [answers(Origin=page) for page in (other, "null", "http://localhost:9")] == [403] * 3
    assert [answers(Host=f"other.example.org:{port}", **page) for page in ({}, {"Origin": f"{other}:{port}"})] == [
        403
    ] * 2
    assert [asks_for_leave(prefect_url, page) for page in (own, other)] == [200, 403]
    logs = prefect_url.replace("http", "ws") + "/logs/out"
    with connect(logs, subprotocols=["prefect"], origin=own) as socket:
        socket.send(json.dumps({"type": "auth", "token": None}))
        assert json.loads(socket.recv(timeout=20))["type"] == "auth_success"
    with pytest.raises(InvalidStatus):
        connect(logs, subprotocols=["prefect"], origin=other)


@pytest.mark.parametrize(
    ("origins", "host", "origin", "admitted"),
    [
        ("http://lab:1", "lab:1", "http://lab:1", True),
        ("http://lab:1", "lab:1", "http://lab:2", False),
        ("https://lab.example.org", "127.0.0.1:1", "https://lab.example.org", True),  # a proxy
        ("http://lab:1", "[::1]:1", None, True),
        ("http://lab:1", "", None, False),
        ("", "", None, False),
        ("*", "other:1", "http://another", True),  # the user said so
    ],
)
def test_a_browser_is_believed_what_page_asks_and_what_it_took_the_server_for(origins, host, origin, admitted):
    headers = {b"host": host} | ({b"origin": origin} if origin else {})
    assert Guard(None, origins.split(",")).admits(headers) == admitted


@pytest.mark.slow
def test_a_page_from_another_machine_works_and_another_page_does_not_use_it(served):
    name, port = served.said[1].split()[1].partition("/#/")[0], served.mlflow.rpartition(":")[2]
    assert name == f"http://{listening.socket.gethostname()}:{port}"
    search, words = f"{served.mlflow}/ajax-api/2.0/mlflow/experiments/search", f"{USER}:{PASSWORD}"

    def from_page(origin: str, host: str) -> int:
        return status(search, words, {"max_results": 1}, Origin=origin, Host=host)

    assert from_page(name, name.removeprefix("http://")) == 200
    assert from_page("http://other.example.org", name.removeprefix("http://")) == 403
    assert from_page(f"http://other.example.org:{port}", f"other.example.org:{port}") == 403
    shown = name.replace(port, served.prefect.split(":")[2].removesuffix("/api"))
    assert [asks_for_leave(served.prefect, origin) for origin in (shown, "http://other.example.org")] == [200, 400]
    with urllib.request.urlopen(served.prefect.removesuffix("/api") + "/ui-settings") as reply:
        settings = json.load(reply)
    assert (settings["api_url"], settings["auth"]) == ("/api", "BASIC")
    assert "by plain HTTP" in served.said[2]


@pytest.mark.slow
def test_a_run_is_recorded_through_them_and_its_passwords_are_seen_nowhere(served, clean):
    process, seen = start(served.folder, served.clients()), commands()
    while process.poll() is None:
        seen |= commands()
        time.sleep(0.2)
    out, error = process.communicate()
    assert (process.returncode, error) == (0, ""), out
    set_all(clean, served.clients())
    key = key_of(served.folder)
    (run,) = mlflow_runs(served.mlflow, key)
    assert (run.info.status, run.data.metrics["passed"]) == ("FINISHED", 1.0)
    assert flows(served, key) == ["COMPLETED"]
    assert any("mlflow server" in line for line in seen) and any("prefect server" in line for line in seen)
    assert [line for line in seen if any(secret in line for secret in SECRETS)] == []
    assert not any(secret in out + json.dumps(run.to_dictionary()) for secret in SECRETS)
    assert searched(served.folder) == []
    guarded = served.folder / ".longlora" / "access"
    assert [oct(path.stat().st_mode & 0o077) for path in (guarded, *guarded.iterdir())] == ["0o0"] * 3

    for command, word in (
        (["promote"], "the verdict passed"),
        (["runs"], "champion"),
        (["history"], "promote"),
        (["run"], "the run is recorded"),
    ):
        done = dummy.longlora(served.folder, *command, env=served.clients())
        assert (done.returncode, done.stderr) == (0, "")
        assert word in done.stdout


@pytest.mark.slow
def test_the_worker_takes_what_is_deployed(served):
    done = dummy.longlora(served.folder, "deploy", "--name", "known", "--set", "train.rank=9", env=served.clients())
    assert done.returncode == 0, done.stderr
    deployment = asked(served, "deployments/name/pipeline/known")["id"]
    asked(served, f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    key, deadline = key_of(served.folder, "train.rank=9"), time.monotonic() + 200
    while flows(served, key) != ["COMPLETED"]:
        assert time.monotonic() < deadline, (served.folder / ".longlora" / "worker.log").read_text()
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "changed", "said"),
    [
        ("run", {"MLFLOW_TRACKING_PASSWORD": FORMER}, "MLflow at {mlflow} does not take the credentials in MLFLOW_"),
        ("runs", {"MLFLOW_TRACKING_PASSWORD": ""}, "MLflow at {mlflow} asks for credentials: set MLFLOW_"),
        ("run", {"PREFECT_API_AUTH_STRING": "ada:x"}, "Prefect at {prefect} does not take the credentials in PREFECT_"),
        ("worker", {"PREFECT_API_AUTH_STRING": ""}, "Prefect at {prefect} asks for credentials: set PREFECT_"),
    ],
)
def test_wrong_credentials_are_one_line_and_no_stage_is_run(served, command, changed, said):
    before = dummy.executions(served.folder)
    settings = ["--set", "train.rank=31"] if command == "run" else []
    done = dummy.longlora(served.folder, command, *settings, env=served.clients(**changed))
    expected = said.format(mlflow=served.mlflow, prefect=served.prefect.removesuffix("/api"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
    assert dummy.executions(served.folder) == before


def asked(served: Served, path: str, body: dict[str, Any] | None = None) -> Any:
    """Prefect's own interface, by one it knows."""
    headers = {
        "Authorization": f"Basic {base64.b64encode(STRING.encode()).decode()}",
        "content-type": "application/json",
    }
    data, deadline = None if body is None else json.dumps(body).encode(), time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{served.prefect}/{path}", data, headers)) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            # While another process writes to its SQLite database, the server asks for patience; its own clients have it.
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(1)


def flows(served: Served, key: str) -> list[str]:
    found = asked(served, "flow_runs/filter", {"flow_runs": {"name": {"like_": key}}})
    return [each["state_type"] for each in found]


@pytest.mark.slow
def test_the_server_that_a_run_starts_for_itself_asks_too(clean, tmp_path):
    set_all(clean, {**CREDENTIALS, "PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "1"})
    (tmp_path / ".longlora").mkdir()
    with servers.prefect_api(Project(tmp_path, tmp_path)) as ready:
        ready()
        address = f"{os.environ['PREFECT_API_URL']}/admin/version"
        assert (status(address), status(address, STRING)) == (401, 200)
        own = os.environ["PREFECT_API_URL"].removesuffix("/api")
        pages = (own, own.replace("127.0.0.1", "localhost"), "http://other.example.org", "null")
        assert [asks_for_leave(f"{own}/api", page) for page in pages] == [200, 200, 400, 400]


def test_the_search_finds_what_is_there(folder):
    dummy.write(folder / "note", base64.b64encode(STRING.encode()).decode())
    dummy.commit(folder)
    assert len(searched(folder)) == 2
