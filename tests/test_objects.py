"""Object storage: data and artifacts of a run on an S3-compatible server, over HTTP, and another clone that has nothing else."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import dummy
import pytest
from test_pipeline import key_of, mlflow_runs

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[str]:
    """The address of a server with one empty bucket, `runs`."""
    import boto3

    from tasks import daemon, servers
    from tasks.listening import LOOPBACK

    port, log = servers.free_port(), tmp_path_factory.mktemp("s3") / "log"
    server = daemon.start([sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)], log)
    address = f"http://{LOOPBACK}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "MLFLOW_S3_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        daemon.wait_for(f"{address}/moto-api/data.json", server, log)
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="runs")
        yield address
    daemon.stop(server)


@pytest.fixture
def tracking_uri(s3, tmp_path) -> Iterator[str]:
    """The address of an MLflow server whose artifacts go to the bucket, as docs/schedule.md starts it."""
    from tasks import daemon, servers
    from tasks.listening import LOOPBACK

    port, log = servers.free_port(), tmp_path / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--default-artifact-root", "s3://runs/mlflow"]
    settings = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = daemon.start(command, log, env=settings)
    daemon.wait_for(f"http://{LOOPBACK}:{port}/health", server, log)
    yield f"http://{LOOPBACK}:{port}"
    daemon.stop(server)


def test_a_run_is_kept_on_s3_and_another_clone_has_it_from_there_alone(s3, tracking_uri, folder, prefect_url, tmp_path):
    import boto3

    def as_user(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, check=True, capture_output=True)

    as_user("remote", "add", "-d", "lab", "s3://runs/data")
    as_user("remote", "modify", "lab", "endpointurl", s3)
    dummy.commit(folder)
    env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_TRACKING_URI": tracking_uri, "PREFECT_API_URL": prefect_url}
    done = dummy.longlora(folder, "run", "--set", "train.rank=6", "--promote", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    key, bucket = key_of(folder, "train.rank=6"), boto3.client("s3", endpoint_url=s3)
    names = [each["Key"] for each in bucket.list_objects_v2(Bucket="runs")["Contents"]]
    assert any(name.startswith("data/files/md5/") for name in names)
    (run,) = mlflow_runs(tracking_uri, key)
    assert run.data.tags["longlora.remote"] == "s3://runs/data"
    assert run.info.artifact_uri.startswith("s3://runs/mlflow/")
    verdict = run.info.artifact_uri.removeprefix("s3://runs/") + "/metrics/verdict.json"
    assert json.load(bucket.get_object(Bucket="runs", Key=verdict)["Body"])["passed"] is True
    assert not any((folder / ".longlora" / kept).exists() for kept in ("mlartifacts", "mlflow.db", "remote"))

    dummy.git(tmp_path, "clone", "--quiet", "--mirror", str(folder), "shared.git")
    shutil.rmtree(folder)
    dummy.git(tmp_path, "clone", "--quiet", str(tmp_path / "shared.git"), "second")
    done = dummy.longlora(tmp_path / "second", "reproduce", key, env=KEYS)
    assert done.returncode == 0, done.stderr
    assert "7 of 7 outputs are equal by hash" in done.stdout
    for kept in (".dvc/cache", f".longlora/worktrees/{key}"):
        shutil.rmtree(tmp_path / "second" / kept)
    refused = dummy.longlora(tmp_path / "second", "reproduce", key, "--remote", "s3://nowhere/data", env=KEYS)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "neither the cache nor s3://nowhere/data has" in refused.stderr
    assert subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path / "second", capture_output=True).stdout == b""


def test_a_store_that_does_not_answer_is_one_line_at_the_start_and_once_its_run_is_to_be_kept(folder, monkeypatch):
    from tasks.errors import UserError
    from tasks.stages import DvcRepo

    for name, value in {**KEYS, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    store = "['remote \"lab\"']\n    url = s3://runs/data\n    endpointurl = http://127.0.0.1:9\n"
    dummy.write(folder / ".dvc" / "config", f"[core]\n    analytics = false\n    remote = lab\n{store}")
    with closing(DvcRepo(folder, environment={})) as dvc:
        dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
        for call in (dvc.must_reach_remote, dvc.push):
            with pytest.raises(
                UserError, match=r"^the DVC remote s3://runs/data: Could not connect to .*: the same command"
            ):
                call()


def test_a_bucket_that_is_not_there_is_said_at_the_start_and_a_folder_in_one_is_made_later(s3, folder):
    from tasks.errors import UserError
    from tasks.stages import DvcRepo

    def at(url: str) -> DvcRepo:
        store = f"['remote \"lab\"']\n    url = {url}\n    endpointurl = {s3}\n"
        dummy.write(folder / ".dvc" / "config", f"[core]\n    analytics = false\n    remote = lab\n{store}")
        return DvcRepo(folder, environment={})

    with closing(at("s3://runs/not/yet")) as dvc:
        dvc.must_reach_remote()
    with closing(at("s3://nowhere/data")) as dvc, pytest.raises(UserError, match="bucket does not exist"):
        dvc.must_reach_remote()


def test_the_extra_brings_what_both_need():
    """Here moto brings boto3; where only the extra is installed, MLflow could not write."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["s3"] == ["boto3", "dvc-s3"]
