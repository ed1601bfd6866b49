"""MLflow and Prefect on a real PostgreSQL, by URL: started here, as a user that is not root, on a loopback port."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dummy
import pytest
from test_deploy import run_deployment, start_up, state_of, wait_until
from test_pipeline import NAMES, key_of, mlflow_runs

from tasks.listening import LOOPBACK
from tasks.servers import free_port
from tasks.workspace import project

pytestmark = pytest.mark.slow
SECRET = "s3cretWord"
HOMES = [Path(name) for name in os.environ["PATH"].split(os.pathsep)] + sorted(
    Path("/usr/lib/postgresql").glob("*/bin")
)


def program(name: str) -> str:
    """Where PostgreSQL's program is: Debian keeps it off the PATH."""
    found = [home / name for home in HOMES if (home / name).exists()]
    if not found:
        pytest.skip(f"no {name} here: install PostgreSQL (Debian: postgresql), or put its programs on the PATH")
    return str(found[-1].resolve())


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server with the databases `mlflow` and `prefect`; user, password, host and port of its address."""
    home = Path(tempfile.mkdtemp(prefix="postgres"))  # pytest's own folders are closed to other users
    other: dict[str, Any] = {"cwd": home, "capture_output": True, "check": True, "text": True}
    if os.getuid() == 0:  # PostgreSQL does not run as root
        shutil.chown(home, "nobody")
        other |= {"user": "nobody", "group": home.stat().st_gid, "extra_groups": []}
    (home / "password").write_text(SECRET)
    data, port = home / "data", free_port()
    how = ["-D", str(data), "-U", "lab", "--auth", "scram-sha-256", "--pwfile", str(home / "password"), "--no-sync"]
    subprocess.run([program("initdb"), *how], **other)
    options = f"-c listen_addresses={LOOPBACK} -p {port} -k {home} -c fsync=off"
    control = [program("pg_ctl"), "-D", str(data), "-w", "-l", str(home / "log")]
    try:
        subprocess.run([*control, "-o", options, "start"], **{**other, "capture_output": False})
        for name in ("mlflow", "prefect"):
            settings = {**os.environ, "PGPASSWORD": SECRET}
            create = [program("createdb"), "-h", LOOPBACK, "-p", str(port), "-U", "lab", name]
            subprocess.run(create, env=settings, **other)
        yield f"lab:{SECRET}@{LOOPBACK}:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **{**other, "check": False})
        shutil.rmtree(home)


def rows(address: str, query: str) -> list[tuple[Any, ...]]:
    import psycopg2

    connection = psycopg2.connect(f"postgresql://{address}")
    with connection.cursor() as cursor:
        cursor.execute(query)
        found = cursor.fetchall()
    connection.close()
    return found


def test_a_run_is_recorded_and_promoted_on_postgresql_and_its_password_is_kept_nowhere(folder, postgres):
    uri = f"postgresql+psycopg2://{postgres}/mlflow"
    env = {
        "MLFLOW_TRACKING_URI": uri,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
    }
    done = dummy.longlora(folder, "run", "--promote", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    key = key_of(folder)
    (run,) = mlflow_runs(uri, key)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["passed"] == 1.0
    assert run.info.artifact_uri.startswith((folder / ".longlora").as_uri())
    assert rows(f"{postgres}/mlflow", "select alias, version from registered_model_aliases order by alias") == [
        ("candidate", 1),
        ("champion", 1),
    ]
    flows = rows(f"{postgres}/prefect", "select name, state_type from flow_run")
    assert (f"params-{key}", "COMPLETED") in flows and {state for _, state in flows} == {"COMPLETED"}
    tasks = {
        name for (name,) in rows(f"{postgres}/prefect", "select name from task_run where state_type = 'COMPLETED'")
    }
    assert {*NAMES, "record"} <= tasks

    again = dummy.longlora(folder, "run", env=env)
    assert "every stage is unchanged, and the run is recorded" in again.stdout
    assert dummy.git(folder, "status", "--porcelain") == ""
    assert not (project(folder).state / "mlflow.db").exists()
    kept = [path for path in (folder / ".longlora").rglob("*") if path.is_file()]
    assert len(kept) > 10
    assert not [str(path) for path in kept if SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout + json.dumps(run.data.tags)


@pytest.mark.long
def test_up_on_postgresql_runs_a_deployment_and_its_model_is_promoted(folder, postgres):
    uri = f"postgresql+psycopg2://{postgres}/mlflow"
    env = {
        "MLFLOW_TRACKING_URI": uri,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
    }
    (folder / "prefect.yaml").write_text((Path(__file__).parent.parent / "prefect.yaml").read_text())
    text = (folder / "dvc.yaml").read_text().replace("\n  dummy:\n", "\n  deployed:\n")  # a model of its own
    dummy.write(folder / "dvc.yaml", text)
    dummy.commit(folder)
    port = str(free_port())
    url, log = f"http://{LOOPBACK}:{port}/api", folder / ".longlora" / "worker.log"
    servers = start_up(folder, ["--prefect-port", port], env)
    try:
        done = dummy.longlora(folder, "deploy", "--name", "killed", "--promote", env=env)
        assert done.returncode == 0, done.stderr
        flow_run = run_deployment(url)
        wait_until(lambda: state_of(url, flow_run) == "Completed", log)
        (run,) = mlflow_runs(uri, key_of(folder))
        assert run.info.status == "FINISHED"
        aliases = "select alias, version from registered_model_aliases where name = 'deployed' order by alias"
        assert rows(f"{postgres}/mlflow", aliases) == [("candidate", 1), ("champion", 1)]
        named = f"select state_type from flow_run where id = '{flow_run}'"
        assert rows(f"{postgres}/prefect", named) == [("COMPLETED",)]
        assert "is the champion already" in dummy.longlora(folder, "promote", env=env).stdout
        state = project(folder).state
        assert not (state / "mlflow.db").exists() and not (state / "prefect" / "prefect.db").exists()
    finally:
        servers.terminate()
        servers.wait(timeout=60)


def test_a_database_that_does_not_answer_is_one_line_without_its_password(folder):
    uri = f"postgresql://lab:{SECRET}@{LOOPBACK}:1/mlflow"
    done = dummy.longlora(folder, "runs", env={"MLFLOW_TRACKING_URI": uri})
    assert done.returncode == 1
    assert done.stderr == (
        f"error: nobody answers at postgresql://{LOOPBACK}:1 ([Errno 111] Connection refused): "
        "start it, or change MLFLOW_TRACKING_URI\n"
    )
