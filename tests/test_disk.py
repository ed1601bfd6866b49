"""A full disk, a lost share: the run ends in one line; with room, or the share back, the same command ends it."""

import shutil

import dummy
import pytest
from test_pipeline import key_of, mlflow_runs, read_until, start

pytestmark = pytest.mark.slow
SLOW = ["train.seconds=0.3", "train.steps=8"]


def test_a_run_whose_remote_is_gone_ends_in_one_line_and_goes_on_when_it_is_back(
    own, environment, mlflow_uri, tmp_path
):
    share = tmp_path / "share"
    share.mkdir()
    (own / ".dvc" / "config").write_text(
        (own / ".dvc" / "config").read_text().replace("../.longlora/remote", str(share))
    )
    dummy.commit(own)
    process = start(own, environment, *SLOW)
    read_until(process, "train | step 2")
    share.rename(tmp_path / "lost")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 1, out
    assert error == f"error: the DVC remote {share} is not there: bring it back, or make it if it is new\n"
    assert not share.exists()
    key = key_of(own, *SLOW)
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["FAILED"]

    (tmp_path / "lost").rename(share)
    again = start(own, environment, *SLOW)
    out, error = again.communicate(timeout=200)
    assert (again.returncode, error) == (0, ""), out + error
    assert dummy.executions(own).count("train base") == 1
    (run,) = mlflow_runs(mlflow_uri, key)
    assert run.info.status == "FINISHED"
    record = dummy.git(own, "rev-parse", f"refs/longlora/runs/{key}")
    assert run.data.tags["longlora.record"] == record
    shutil.rmtree(own / ".dvc" / "cache")  # all of it is on the remote, and equal by hash
    done = dummy.longlora(own, "reproduce", key, env={"MLFLOW_TRACKING_URI": mlflow_uri})
    assert done.returncode == 0, done.stderr
