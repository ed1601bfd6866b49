"""Object storage: data and artifacts of a run on an S3-compatible server, over HTTP, and another clone that has nothing else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import byhand
import dummy
import pytest

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[str]:
    """The address of a server with one empty bucket, `runs`."""
    import boto3

    from tasks import daemon, servers

    port, log = servers.free_port(), tmp_path_factory.mktemp("s3") / "log"
    server = daemon.start([sys.executable, "-m", "moto.server", "-H", servers.HOST, "-p", str(port)], log)
    address = f"http://{servers.HOST}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "MLFLOW_S3_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        daemon.wait_for(f"{address}/moto-api/data.json", server, log)
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="runs")
        yield address
    daemon.stop(server)


def test_a_run_is_pushed_and_another_clone_pulls_it(s3, folder, tmp_path, mlflow_uri, monkeypatch):
    import boto3
    from mlflow.artifacts import download_artifacts

    from tasks import runs, tracking
    from tasks.workspace import project

    remote = f"['remote \"s3\"']\n    url = s3://runs/data\n    endpointurl = {s3}\n"
    dummy.write(folder / ".dvc" / "config", f"[core]\n    analytics = false\n    remote = s3\n{remote}")
    text = (folder / "dvc.yaml").read_text().replace("  dummy:\n", "  objects:\n")  # an experiment of its own
    dummy.write(folder / "dvc.yaml", text)
    dummy.commit(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    client = tracking.connect()
    client.create_experiment("objects", artifact_location="s3://runs/mlflow")
    key = byhand.run(folder, "train.rank=6", tracked="objects")
    names = [each["Key"] for each in boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket="runs")["Contents"]]
    assert any(name.startswith("data/files/md5/") for name in names)
    run = runs.chosen(client, project(folder), key)
    verdict = download_artifacts(
        artifact_uri=f"{run.info.artifact_uri}/metrics/verdict.json", dst_path=str(tmp_path / "got")
    )
    assert json.loads(Path(verdict).read_text())["passed"] is True

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
