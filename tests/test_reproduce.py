"""A run brought back on another clone, from git and the DVC remote alone, and what is said when it cannot be."""

import json
import os
import shutil
from pathlib import Path

import byhand
import dummy
import pytest

from tasks.hashes import hash_of
from tasks.outputs import compared, read
from tasks.storage import bring_record, recorded
from tasks.workspace import project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(template, tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run's record on a bare git repository (`git`), its data on a DVC remote (`data`); and its key.

    The clone that ran it is gone.
    """
    home = tmp_path_factory.mktemp("shared")
    dummy.git(home, "clone", "--quiet", "--bare", str(template), "git")
    dummy.git(home, "clone", "--quiet", str(home / "git"), "first")
    key = byhand.run(home / "first", "train.rank=5", remote=str(home / "data"))
    dummy.git(home / "first", "push", "--quiet", "origin", f"refs/longlora/runs/{key}")
    shutil.rmtree(home / "first")
    return home, key


@pytest.fixture
def clone(shared, tmp_path) -> Path:
    dummy.git(tmp_path, "clone", "--quiet", str(shared[0] / "git"), "second")
    return tmp_path / "second"


def test_another_clone_brings_everything_back_and_a_changed_byte_is_seen(shared, clone):
    home, key = shared
    done = dummy.longlora(clone, "reproduce", key[:6], "--remote", str(home / "data"))
    assert done.returncode == 0, done.stderr
    work = clone / ".longlora" / "worktrees" / key
    assert done.stdout.splitlines()[-1] == f"run {key} is back in {work}: 7 of 7 outputs are equal by hash"
    assert "rank: 5" in (work / "params.yaml").read_text()
    assert (work / "models" / "tuned" / "weights").read_text() == "b" * 5
    assert dummy.executions(clone) == []
    assert dummy.git(clone, "status", "--porcelain") == ""
    assert not (clone / ".longlora" / "mlflow.db").exists()

    commit = recorded(project(clone))[key]
    (work / "models" / "tuned" / "weights").unlink()
    (work / "models" / "tuned" / "weights").write_text("bbbbB")
    (work / "metrics" / "verdict.json").unlink()
    wrong = {out.path: out.found for out in compared(clone, commit, work, varying=set()) if not out.equal}
    assert wrong.keys() == {"models/tuned", "metrics/verdict.json"}
    assert wrong["metrics/verdict.json"] == ""
    # and the command puts it right again
    assert dummy.called(clone, "reproduce", key).returncode == 0
    assert (work / "models" / "tuned" / "weights").read_text() == "b" * 5


def test_another_clone_finds_a_run_by_its_mlflow_id_and_its_data_by_what_mlflow_says(
    template, tmp_path, mlflow_uri, monkeypatch
):
    from flows.cli.reproduce import find
    from tasks import tracking
    from tasks.servers import local_tracking
    from tasks.tags import GIT, REMOTE

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    for name in ("published", "empty"):  # the other clone's own origin has no run
        dummy.git(tmp_path, "clone", "--quiet", "--bare", str(template), name)
    dummy.git(tmp_path, "clone", "--quiet", str(tmp_path / "published"), "first")
    key = byhand.run(tmp_path / "first", "train.rank=6", remote=str(tmp_path / "data"), tracked="dummy")
    dummy.git(tmp_path / "first", "push", "--quiet", "origin", f"refs/longlora/runs/{key}")
    client = tracking.connect()
    run = tracking.find(client, project(tmp_path / "first"), client.get_experiment_by_name("dummy").experiment_id, key)
    client.set_tag(run.info.run_id, GIT, str(tmp_path / "published"))  # as `longlora run` says it
    client.set_tag(run.info.run_id, REMOTE, str(tmp_path / "data"))
    shutil.rmtree(tmp_path / "first")

    dummy.git(tmp_path, "clone", "--quiet", str(tmp_path / "empty"), "second")
    done = dummy.longlora(tmp_path / "second", "reproduce", run.info.run_id, env={"MLFLOW_TRACKING_URI": mlflow_uri})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"run {key} is back in " in done.stdout and "7 of 7 outputs are equal by hash" in done.stdout

    where, unknown = project(tmp_path / "second"), "0123456789abcdef" * 2
    for address in (mlflow_uri, local_tracking(where)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        said = f"^run '{unknown}': MLflow at {address} has no run of this id: set MLFLOW_TRACKING_URI to the server that has"
        with pytest.raises(ValueError, match=said):
            find(where, unknown)


def test_rerun_computes_every_stage_again_and_finds_the_same_or_says_what_differs(shared, clone):
    home, key = shared
    done = dummy.longlora(clone, "reproduce", key, "--rerun", "--remote", str(home / "data"))
    assert done.returncode == 0, done.stderr
    assert "train | step 3" in done.stdout
    again = clone / ".longlora" / "worktrees" / f"{key}-again"
    assert done.stdout.splitlines()[-1] == f"run {key}, computed again in {again}: 7 of 7 outputs are equal by hash"
    assert not again.exists()

    # a stage that does not repeat itself (but always writes as many digits: scores count them), recorded as a run of its own
    code = (clone / "dummy" / "stage.py").read_text()
    dummy.write(clone / "dummy" / "stage.py", code.replace('.write_text("b")', ".write_text(str(time.time_ns()))"))
    dummy.commit(clone)
    other = byhand.run(clone)
    done = dummy.called(clone, "reproduce", other, "--rerun")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "outputs differ from the record: models/base, models/tuned" in done.stderr


def test_rerun_brings_the_model_that_was_measured_beside(folder):
    from dvc.repo import Repo

    from flows.cli.reproduce import compute_again

    dummy.write(folder / "rivals" / "old" / "weights", "bbb")
    with Repo(str(folder)) as repo:
        repo.add(str(folder / "rivals" / "old"))
    dummy.commit(folder)
    key = byhand.run(folder, "rivals.models=[old]")
    again = compute_again(project(folder), key, f"{key}-again")
    differ = [
        out.path for out in compared(folder, recorded(project(folder))[key], again, varying=set()) if not out.equal
    ]
    assert differ == []
    assert (again / "metrics" / "score" / "old.json").exists()


def test_what_is_not_reachable_is_one_line(shared, clone, tmp_path):
    _, key = shared

    def said(*arguments: str, **env: str) -> str:
        done = dummy.called(clone, "reproduce", *arguments, env=env)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        return done.stderr

    assert "no finished run yet" in said()
    assert "run 'zzz': must be 4 to 12 digits of its key" in said("zzz")
    assert "run '0123456789ab' is not recorded here, nor on origin" in said("0123456789ab")
    gone = said("0123456789ab", LONGLORA_GIT_REMOTE=str(tmp_path / "nowhere"))
    assert "does not appear to be a git repository" in gone or "is not recorded here, nor on" in gone
    lost = said(key)
    assert f"run {key}: neither the cache nor the DVC remote has metrics/history.csv and 6 more outputs" in lost
    assert "--remote ADDRESS" in lost


def test_a_ref_that_is_no_record_of_its_key_is_refused(clone):
    dummy.git(clone, "commit", "--quiet", "--allow-empty", "--message", "one more")
    dummy.git(clone, "update-ref", "refs/longlora/runs/0123456789ab", "HEAD")
    with pytest.raises(ValueError, match="is not the record of run 0123456789ab"):
        bring_record(project(clone), "0123456789ab", [])


def test_our_hashes_are_dvcs_read_from_the_bytes_and_not_from_its_memory(shared, clone):
    home, key = shared
    dummy.longlora(clone, "reproduce", key, "--remote", str(home / "data"))
    work = clone / ".longlora" / "worktrees" / key
    dummy.write(work / "odd" / "b" / "x", "1")
    dummy.write(work / "odd" / "b.c", "ä")
    dummy.write(work / "odd" / "a-b", "")
    from dvc.repo import Repo

    with Repo(str(work)) as repo:
        (stage,) = repo.add(str(work / "odd"))
    assert hash_of(work / "odd") == (added := stage.outs[0].hash_info.value)
    file = work / "odd" / "b" / "x"
    before = file.stat()
    file.write_text("2")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Repo(str(work)) as repo:
        assert hash_of(work / "odd", repo.cache.local) == added
    assert hash_of(work / "odd") not in (added, "")


def test_a_lock_cut_off_anywhere_is_no_obstacle_and_the_order_of_stages_no_difference(folder):
    from tasks.storage import in_order

    key = byhand.run(folder)
    lock = folder / ".longlora" / "worktrees" / key / "dvc.lock"
    whole, ran, commit = lock.read_text(), dummy.executions(folder), recorded(project(folder))[key]
    for cut in (0, 5, len(whole) // 3, len(whole) // 2, len(whole) - 9):
        lock.write_text(whole[:cut])
        assert byhand.run(folder) == key
        assert recorded(project(folder))[key] == commit
    for rwlock in ("", '{"read": {'):
        (lock.parent / ".dvc" / "tmp" / "rwlock").write_text(rwlock)
        assert byhand.run(folder) == key
    assert dummy.executions(folder) == ran  # the run cache had it all
    assert (
        in_order("a:\nstages:\n  z:\n    - 1\n  b@c:\n    d: 2\n") == "a:\nstages:\n  b@c:\n    d: 2\n  z:\n    - 1\n"
    )
    assert in_order("schema: '2.0'\n") == "schema: '2.0'\n"


def test_a_verdict_that_was_written_into_the_cache_is_not_read(template, tmp_path):
    """A run's file may be a link into the cache, and root, or who changes its mode, writes through it."""
    dummy.git(tmp_path, "clone", "--quiet", str(template), "clone")
    folder = tmp_path / "clone"
    key = byhand.run(folder, "gate.least=9.0")
    rev = dummy.git(folder, "rev-parse", f"refs/longlora/runs/{key}")
    assert not json.loads(read(folder, rev, "metrics/verdict.json"))["passed"]
    digest = hash_of(folder / ".longlora/worktrees" / key / "metrics/verdict.json")
    file = folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    file.chmod(0o644)
    file.write_text('{"passed": true, "rules": []}')
    file.chmod(0o444)
    with pytest.raises(
        ValueError, match=rf"metrics/verdict.json at \w{{12}} is damaged in the cache: its hash .* must be {digest}"
    ):
        read(folder, rev, "metrics/verdict.json")


def test_scores_that_were_written_into_the_cache_are_not_judged(template, tmp_path):
    dummy.git(tmp_path, "clone", "--quiet", str(template), "clone")
    folder = tmp_path / "clone"
    key = byhand.run(folder)
    digest = hash_of(folder / ".longlora/worktrees" / key / "metrics/score/tuned.json")
    file = folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    file.chmod(0o644)
    file.write_text(file.read_text().replace(": 1.0", ": 9.0").replace(": 2.0", ": 9.0"))
    file.chmod(0o444)
    with pytest.raises(ValueError, match=rf"metrics/score/tuned.json is damaged in the cache: .* must be {digest}"):
        byhand.run(folder, "gate.least=3.0")
