"""Schedules and servers: a cron deployment must create a run and finish it, for a healthy server proves nothing."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import dummy
import psutil
import pytest
import yaml
from test_chaos import must_be_recorded_once
from test_pipeline import SAVING, ask, cancel, flow_runs, key_of, mlflow_runs, read_until
from test_supervise import alive, wait_until_gone

pytestmark = pytest.mark.slow


@pytest.fixture
def deployed(folder: Path) -> Path:
    """The dummy project with this project's own prefect.yaml."""
    text = (Path(__file__).parent.parent / "prefect.yaml").read_text()
    (folder / "prefect.yaml").write_text(text)
    dummy.commit(folder)
    return folder


def test_up_cron_deployment_run_promotion_and_an_end_without_leftovers(deployed):
    from tasks.servers import free_port

    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    env = {**dummy.clean_environment(), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
    command = [str(Path(sys.executable).with_name("longlora")), "up", *ports]
    servers = subprocess.Popen(
        command, cwd=deployed, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = [servers.stdout.readline() for _ in range(3)]
        assert said[0] == f"Prefect: http://127.0.0.1:{ports[1]}\n", servers.stderr.read() if not said[0] else said
        assert said[1].startswith(f"MLflow: http://127.0.0.1:{ports[3]} (its switch *Model training*, ")
        for page in said[:2]:
            browser = urllib.request.Request(page.split()[1], headers={"Accept": "text/html"})
            with urllib.request.urlopen(browser) as reply:
                assert reply.status == 200
                assert "/v2" not in reply.url  # Prefect's newer page, which asks amplitude.com for its settings

        arguments = ["--name", "minutely", "--cron", "* * * * *", "--set", "train.rank=20", "--promote"]
        done = dummy.longlora(deployed, "deploy", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("pipeline/minutely runs by cron '* * * * *' (UTC)")
        assert dummy.git(deployed, "status", "--porcelain") == ""

        url, key = f"http://127.0.0.1:{ports[1]}/api", key_of(deployed, "train.rank=20")
        deadline = time.monotonic() + 240
        while not (
            runs := ask(
                url,
                "flow_runs",
                {"flow_runs": {"name": {"any_": [f"params-{key}"]}, "state": {"name": {"any_": ["Completed"]}}}},
            )
        ):
            assert time.monotonic() < deadline, (deployed / ".longlora" / "worker.log").read_text()
            time.sleep(1)
        assert runs[0]["parameters"] == {
            "recipe": None,
            "overrides": ["train.rank=20"],
            "scheduled": True,
            "promote": True,
        }
        assert runs[0]["auto_scheduled"]
        (recorded,) = mlflow_runs(f"http://127.0.0.1:{ports[3]}", key)
        picture = recorded.data.tags["mlflow.note.content"].split("![score](")[1].split(")")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[3]}/{picture}") as reply:
            assert reply.read() == b"a picture"
        assert "the verdict passed" in " ".join(dummy.longlora(deployed, "history").stdout.split())
        assert dummy.longlora(deployed, "run", "--set", "train.rank=20").stdout.count("unchanged") >= 6
        assert json.loads((deployed / ".longlora" / "finished" / f"{key}.json").read_text())["record"]
    finally:
        servers.send_signal(signal.SIGTERM)
        servers.communicate(timeout=60)
    assert not (deployed / ".longlora" / "prefect.url").exists()
    assert servers.returncode == 128 + signal.SIGTERM
    wait_until_gone(deployed / ".longlora" / "worktrees" / key, 5)
    with pytest.raises(OSError):
        urllib.request.urlopen(said[0].split()[1], timeout=2)


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_cancel_of_a_workers_run_ends_it_after_the_stage_has_saved(own, environment, mlflow_uri):
    dummy.write(own / "prefect.yaml", (Path(__file__).parent.parent / "prefect.yaml").read_text())
    dummy.write(own / "dummy" / "stage.py", SAVING + (own / "dummy" / "stage.py").read_text())
    dummy.commit(own)
    env, url = {**environment, "LONGLORA_GRACE": "60"}, environment["PREFECT_API_URL"]
    name, key = own.parent.name, key_of(own, "train.seconds=60")
    assert dummy.longlora(own, "deploy", "--name", name, "--set", "train.seconds=60", env=env).returncode == 0
    (deployment,) = ask(url, "deployments", {"deployments": {"name": {"any_": [name]}}})
    address = f"{url}/deployments/{deployment['id']}/create_flow_run"
    urllib.request.urlopen(urllib.request.Request(address, b"{}", {"content-type": "application/json"})).close()
    command = [str(Path(sys.executable).with_name("longlora")), "worker"]
    theirs = {**dummy.clean_environment(), **env, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    worker = subprocess.Popen(command, cwd=own, env=theirs, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: "train base" in dummy.executions(own))
        assert alive(own / ".longlora" / "worktrees" / key)
        cancel(url, key)
        wait_until_gone(own / ".longlora" / "worktrees" / key, 60)
        assert (own / ".longlora" / "checkpoints" / "saved").exists()
        wait_for(lambda: [run["state"]["name"] for run in flow_runs(url, key)] == ["Cancelled"])
        wait_for(lambda: [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["KILLED"])
    finally:
        worker.terminate()
        worker.wait(30)


@pytest.mark.parametrize(
    ("places", "seconds", "ends"),
    [
        (1, 1, ["Completed", "Completed"]),
        (2, 10, ["Busy", "Completed"]),  # three steps: the second begins well before the first is done
    ],
)
def test_runs_that_were_due_while_no_worker_was_up_do_not_all_begin_at_once(
    deployed, prefect_url, monkeypatch, places, seconds, ends
):
    from tasks import up

    name = f"due-{places}"

    def states(key: str = "state_type") -> list[str]:
        found = ask(prefect_url, "flow_runs", {"deployments": {"name": {"any_": [name]}}})
        return [run[key] for run in found]

    monkeypatch.setattr(up, "AT_ONCE", places)
    env = {"PREFECT_API_URL": prefect_url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    slow = f"train.seconds={seconds}"
    assert dummy.longlora(deployed, "deploy", "--name", name, "--set", slow, env=env).returncode == 0
    (deployment,) = ask(prefect_url, "deployments", {"deployments": {"name": {"any_": [name]}}})
    address = f"{prefect_url}/deployments/{deployment['id']}/create_flow_run"
    for _ in range(2):
        urllib.request.urlopen(urllib.request.Request(address, b"{}", {"content-type": "application/json"})).close()
    worker = subprocess.Popen(
        up.worker_command(), cwd=deployed, env={**dummy.clean_environment(), **env}, stdout=subprocess.DEVNULL
    )
    try:
        seen: list[list[str]] = []
        wait_for(lambda: seen.append(states()) or set(seen[-1]) == {"COMPLETED"}, seconds=240)
    finally:
        worker.terminate()
        worker.wait(30)
    if places == 1:  # two runs would never be more than two
        assert all(now.count("RUNNING") + now.count("PENDING") <= 1 for now in seen)
    assert sorted(states("state_name")) == ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cron", "99 * * * *"], "--cron '99 * * * *' --timezone UTC: Invalid cron string"),
        (["--cron", "0 3 * * *", "--timezone", "Mars"], "Invalid timezone"),
        (["--cron", "0 3 * * *", "--interval", "90"], "--cron and --interval: give one of them"),
        (["--interval", "5"], "--interval 5: must be 60 seconds or more"),
        (["--interval", "nan"], "--interval nan: must be 60 seconds or more"),
        (["--interval", "inf"], "--interval inf: must be 60 seconds or more"),
        (["--watch", "data", "--interval", "90"], "--watch data: there is nothing at"),
        (["--watch", ".gitignore", "--interval", "90"], "--watch .gitignore: no stage reads it; name "),
        (["--watch", "dummy/stage.py"], "--watch dummy/stage.py: say how often to look, with --interval or --cron"),
        (["--beside", "champion"], "has no champion yet"),
        (["--if-worse", "0.1", "--interval", "90"], "has no champion yet"),
        (
            ["--beside", "4711", "--interval", "90", "--if-worse", "0.1"],
            "--beside 4711: with --if-worse it is the champion",
        ),
        (["--set", "train.rnk=5"], "unknown key 'train.rnk'; did you mean 'rank'?"),
    ],
)
def test_a_wrong_schedule_is_one_line(deployed, prefect_url, monkeypatch, arguments, said):
    from flows.cli.main import app, plain_errors

    monkeypatch.chdir(deployed)
    ours = {**dummy.clean_environment(), "PREFECT_API_URL": prefect_url}
    with mock.patch.dict(os.environ, ours, clear=True), pytest.raises(SystemExit) as ended, plain_errors():
        app(["deploy", *arguments], standalone_mode=False)
    assert str(ended.value).startswith("error: ")  # Python prints it to stderr, with status 1
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_second_deployment_leaves_the_pause_and_the_limit_of_the_work_pool(deployed, prefect_url):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.settings import PREFECT_API_URL, temporary_settings

    def deploy() -> None:
        done = dummy.longlora(deployed, "deploy", "--name", "twice", env={"PREFECT_API_URL": prefect_url})
        assert done.returncode == 0, done.stderr

    deploy()
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        client.update_work_pool("local", WorkPoolUpdate(is_paused=True, concurrency_limit=3))
        try:
            deploy()
            pool = client.read_work_pool("local")
        finally:  # other tests share the server
            client.update_work_pool("local", WorkPoolUpdate(is_paused=False, concurrency_limit=None))
    assert (pool.is_paused, pool.concurrency_limit) == (True, 3)


def test_deployed_again_without_a_schedule_it_has_none_and_of_uncommitted_changes_it_warns(deployed, prefect_url):
    def deploy(*arguments: str) -> str:
        done = dummy.longlora(deployed, "deploy", "--name", "again", *arguments, env={"PREFECT_API_URL": prefect_url})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def schedules() -> list[str]:
        (found,) = ask(prefect_url, "deployments", {"deployments": {"name": {"any_": ["again"]}}})
        return [each["schedule"]["cron"] for each in found["schedules"]]

    assert "uncommitted" not in deploy("--cron", "0 3 * * *")
    assert schedules() == ["0 3 * * *"]
    dummy.write(deployed / "recipes" / "new.yaml", "train: {rank: 3}")
    said = deploy()
    assert "runs when asked to" in said
    assert schedules() == []
    assert "has uncommitted changes, and its runs are refused until you commit them" in said


def test_a_wrong_schedule_is_said_before_a_server_is_asked_for(deployed):
    done = dummy.longlora(deployed, "deploy", "--cron", "99 * * * *")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --cron '99 * * * *' --timezone UTC: Invalid cron string")


@pytest.mark.parametrize("content", [None, "deployments: []"])
def test_a_project_whose_prefect_yaml_has_no_pipeline_is_one_line(tmp_path, content):
    from flows.deploy import deployment
    from tasks.workspace import Project

    if content:
        dummy.write(tmp_path / "prefect.yaml", content)
    with pytest.raises(ValueError, match=r"/prefect\.yaml has no deployment 'pipeline'"):
        deployment(Project(tree=tmp_path, root=tmp_path))


def test_a_taken_port_is_one_line(deployed, prefect_url):
    port = prefect_url.split(":")[2].split("/")[0]
    done = dummy.longlora(deployed, "up", "--prefect-port", port)
    assert done.returncode == 1
    assert (
        done.stderr == f"error: port {port} is taken: end what listens there, or choose another with --prefect-port\n"
    )


def start_up(folder: Path, ports: list[str], env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """`longlora up`, once it says that a worker is there."""
    command = [str(Path(sys.executable).with_name("longlora")), "up", *ports]
    env = {**dummy.clean_environment(), "PREFECT_WORKER_QUERY_SECONDS": "1", **(env or {})}
    servers = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    read_until(servers, "a worker runs what is scheduled")
    return servers


SERVER_OF_A_RUN = """
from pathlib import Path
from tasks import servers
from tasks.workspace import project
where = project(Path.cwd())
servers.use_environment(where)
with servers.prefect_api(where) as ready:
    ready()
"""


def test_after_a_run_the_page_of_up_has_all_kinds_of_blocks(folder):
    command, env = [sys.executable, "-c", SERVER_OF_A_RUN], dummy.clean_environment()
    subprocess.run(
        command, cwd=folder, env=env, check=True
    )  # a server that registers none, and must not note that it did
    from tasks.servers import free_port

    port = str(free_port())
    servers = start_up(folder, ["--prefect-port", port, "--mlflow-port", str(free_port())])
    try:
        kinds = {each["slug"] for each in ask(f"http://127.0.0.1:{port}/api", "block_types", {"limit": 200})}
    finally:
        servers.send_signal(signal.SIGINT)
        servers.communicate(timeout=60)
    assert {"slack-webhook", "custom-webhook", "secret"} <= kinds


def run_deployment(url: str, overrides: list[str] | None = None) -> str:
    """The id of a flow run of pipeline/killed, to be begun now."""
    (found,) = ask(url, "deployments", {"deployments": {"name": {"any_": ["killed"]}}})
    address, headers = f"{url}/deployments/{found['id']}/create_flow_run", {"content-type": "application/json"}
    asked = json.dumps({"parameters": {"overrides": overrides}} if overrides else {}).encode()
    for patience in range(20, -1, -1):
        try:
            with urllib.request.urlopen(urllib.request.Request(address, asked, headers)) as reply:
                return json.load(reply)["id"]
        except urllib.error.HTTPError as error:
            if error.code != 503 or not patience:  # its database is busy: Prefect's own client asks again, too
                raise
            time.sleep(1)
    raise AssertionError


def state_of(url: str, flow_run: str) -> str:
    (found,) = ask(url, "flow_runs", {"flow_runs": {"id": {"any_": [flow_run]}}})
    return found["state"]["name"]


def wait_until(what: Callable[[], bool], log: Path, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def test_a_killed_worker_or_server_ends_up_with_all_it_ran_and_the_next_up_goes_on(deployed):
    from tasks.servers import free_port

    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    url, log = f"http://127.0.0.1:{ports[1]}/api", deployed / ".longlora" / "worker.log"
    slow = ["train.seconds=0.5", "train.steps=20"]
    servers = start_up(deployed, ports)
    try:
        done = dummy.longlora(deployed, "deploy", "--name", "killed")
        assert done.returncode == 0, done.stderr
        for killed, name, rank in (("worker start", "the worker", 5), ("prefect server start", "Prefect", 6)):
            settings = [*slow, f"train.rank={rank}"]
            key, trained = key_of(deployed, *settings), dummy.executions(deployed).count("train base")
            cut_off = run_deployment(url, overrides=settings)
            wait_until(lambda: dummy.executions(deployed).count("train base") > trained, log)  # noqa: B023
            (victim,) = [
                each
                for each in psutil.Process(servers.pid).children(recursive=True)
                if killed in (words := " ".join(each.cmdline())) and "supervise.py" not in words
            ]
            victim.kill()
            _, error = servers.communicate(timeout=90)
            assert servers.returncode == 1
            assert error.startswith(f"error: {name} ended: ") and error.count("\n") == 1
            wait_until_gone(deployed / ".longlora" / "worktrees" / key, 5)

            servers = start_up(deployed, ports)
            whole = run_deployment(url, overrides=settings)
            wait_until(lambda: state_of(url, whole) == "Completed", log)  # noqa: B023
            assert state_of(url, cut_off) == "Crashed"
            (run,) = mlflow_runs(f"http://127.0.0.1:{ports[3]}", key)
            assert run.info.status == "FINISHED"
            assert dummy.executions(deployed).count("fetch base") == 1
    finally:
        servers.terminate()
        servers.wait(timeout=60)


def mlflow_of(servers: "subprocess.Popen[str]") -> list[psutil.Process]:
    """MLflow's server of `up`, and the process in it that answers; their supervisor apart."""
    found = []
    for each in psutil.Process(servers.pid).children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(each.cmdline())
            if "mlflow" in words and "supervise.py" not in words:
                found.append(each)
    return found


def is_back(port: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
        return reply.status == 200
    return False


def test_mlflows_server_is_started_again_under_a_run_that_tells_it_and_the_run_is_recorded_once(deployed):
    from tasks.servers import free_port

    ports, settings = [str(free_port()), str(free_port())], ["train.seconds=0.2", "train.steps=20"]
    key, store = key_of(deployed, *settings), f"sqlite:///{deployed}/.longlora/mlflow.db"
    servers = start_up(deployed, ["--prefect-port", ports[0], "--mlflow-port", ports[1]])
    try:
        command = [str(Path(sys.executable).with_name("longlora")), "run", "--promote"]
        command += [word for each in settings for word in ("--set", each)]
        env = {**dummy.clean_environment(), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports[1]}"}
        run = subprocess.Popen(
            command, cwd=deployed, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        read_until(run, "fetch | fetch starts")  # the run is being opened in MLflow
        mlflow_of(servers)[0].kill()
        read_until(run, "report | report starts")  # it is written, and promoted
        wait_until(lambda: is_back(ports[1]), deployed / ".longlora" / "mlflow.log")
        mlflow_of(servers)[-1].kill()
        _, error = run.communicate(timeout=200)
        assert (run.returncode, error) == (0, "")
        must_be_recorded_once(store, key, steps=20)
        again = dummy.longlora(deployed, *command[1:], env=env)
        assert "is the champion already" in again.stdout, again.stderr
        must_be_recorded_once(store, key, steps=20)
    finally:
        servers.terminate()
        _, error = servers.communicate(timeout=60)
    assert [line for line in error.splitlines() if "MLflow" in line] == [
        f"MLflow ended, and is started again (what it said: {deployed}/.longlora/mlflow.log)"
    ] * 2


def looks(url: str, name: str) -> list[str]:
    """How the runs of a deployment ended that its schedule began, the oldest first."""
    query = {
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "RUNNING"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    return [run["state"]["name"] for run in ask(url, "flow_runs", query)]


@pytest.mark.long
def test_new_data_and_a_champion_that_got_worse_start_one_run_each_on_their_schedules(deployed, tmp_path):
    from mlflow import MlflowClient

    from tasks.servers import free_port

    data, log = tmp_path / "documents", deployed / ".longlora" / "worker.log"
    dummy.write(data / "one.txt", "one")
    for name, old, new in (
        (
            "dvc.yaml",
            '[dummy/stage.py, "${models}/${item.model}"',
            f'[{data}, dummy/stage.py, "${{models}}/${{item.model}}"',
        ),
        ("dvc.yaml", '[dummy/stage.py, "rivals/', f'[{data}, dummy/stage.py, "rivals/'),
        ("dummy/stage.py", "size / n", f'size / n / len(os.listdir("{data}"))'),
    ):
        text = (deployed / name).read_text()
        assert old in text
        dummy.write(deployed / name, text.replace(old, new))
    dummy.commit(deployed)
    ports = [str(free_port()), str(free_port())]
    url = f"http://127.0.0.1:{ports[0]}/api"
    servers = start_up(deployed, ["--prefect-port", ports[0], "--mlflow-port", ports[1]])
    try:
        for arguments in (
            ["run", "--promote"],
            ["deploy", "--name", "new-data", "--watch", str(data), "--interval", "60"],
            [
                "deploy",
                "--name",
                "retrain",
                "--if-worse",
                "0.1",
                "--promote",
                "--set",
                "train.rank=30",
                "--interval",
                "60",
            ],
        ):
            done = dummy.longlora(deployed, *arguments)
            assert done.returncode == 0, done.stderr
        wait_until(lambda: looks(url, "new-data")[-1:] == ["Unchanged"], log, seconds=300)
        wait_until(lambda: looks(url, "retrain")[-1:] == ["StillGood"], log, seconds=300)
        (data / "two.txt").write_text("two")  # every score is half of what it was
        wait_until(lambda: looks(url, "new-data").count("Completed") == 2, log, seconds=300)
        wait_until(lambda: looks(url, "retrain").count("Completed") == 1, log, seconds=300)
        seen = [len(looks(url, name)) for name in ("new-data", "retrain")]
        wait_until(lambda: looks(url, "new-data")[seen[0] :].count("Unchanged") >= 2, log, seconds=300)
        wait_until(lambda: looks(url, "retrain")[seen[1] :].count("StillGood") >= 2, log, seconds=300)
        print(f"\nnew-data: {looks(url, 'new-data')}\nretrain: {looks(url, 'retrain')}")
        assert looks(url, "new-data").count("Completed") == 2  # the first look, and the new file
        assert looks(url, "retrain").count("Completed") == 1
        assert {*looks(url, "new-data"), *looks(url, "retrain")} <= {"Completed", "Unchanged", "StillGood", "Running"}
        client = MlflowClient(f"sqlite:///{deployed}/.longlora/mlflow.db")
        experiment = client.get_experiment_by_name("dummy").experiment_id
        assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"] * 4
        assert len(client.search_model_versions("name = 'dummy'")) == 2
        assert str(client.get_model_version_by_alias("dummy", "champion").version) == "2"
    finally:
        servers.terminate()
        servers.wait(timeout=60)


def test_the_example_for_kubernetes_fits_prefects_template_and_the_flow():
    from prefect.server.api import collections_data

    from flows.pipeline import pipeline

    page = (Path(__file__).parent.parent / "docs" / "schedule.md").read_text()
    (entry,) = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["deployments"]
    assert entry["parameters"].keys() <= inspect.signature(pipeline.fn).parameters.keys()
    views = Path(next(iter(collections_data.__path__))) / "views" / "aggregate-worker-metadata.json"
    template = json.loads(views.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    assert entry["work_pool"]["job_variables"].keys() <= template["variables"]["properties"].keys()
    at = template["job_configuration"]
    for name in re.search(r"jq '\.([\w.]+) \|=", page)[1].split("."):
        at = at[name] if name != "job_configuration" else at
    assert at["containers"][0]["image"] == "{{ image }}" and "limits" in at["containers"][0]["resources"]
