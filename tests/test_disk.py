"""A full disk, a lost share: the run ends in one line; with room, or the share back, the same command ends it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import dummy
import pytest
from test_pipeline import key_of, mlflow_runs, read_until, start

from tasks.config import link, must_find_remote_folder
from tasks.workspace import Project

pytestmark = pytest.mark.slow
SLOW = ["train.seconds=0.3", "train.steps=8"]


class Mount:
    """A small file system of its own at `place`, that only the processes of `command` see."""

    def __init__(self, place: Path, size: str) -> None:
        script = f"mount -t tmpfs -o size={size} tmpfs '{place}' && echo mounted && read end"
        self.holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.holder.stdout
        self.said = self.holder.stdout.readline().strip()
        self.place = place
        self.seen = Path(f"/proc/{self.holder.pid}/root{place}")
        """The same folder, for everybody."""

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.holder.pid), "--user", "--preserve-credentials", "--mount", *words]

    def git(self, *words: str) -> str:
        env = {**os.environ, **dummy.ENV}
        return subprocess.run(
            self.command("git", *words), env=env, check=True, capture_output=True, text=True
        ).stdout.strip()

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Mount]:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("there is no unshare or nsenter here (util-linux)")
    place = tmp_path / "small"
    place.mkdir()
    mount = Mount(place, "24m")
    if mount.said != "mounted":
        mount.close()
        pytest.skip(f"no file system can be mounted here: {mount.said}")
    yield mount
    mount.close()


def fill(file: Path) -> None:
    """Take all the room there is."""
    with file.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12):
            try:
                while stream.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def longlora(mount: Mount, folder: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    settings = [word for override in SLOW for word in ("--set", override)]
    command = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(folder)]
    command += [str(Path(sys.executable).with_name("longlora")), "run", *settings]
    env = {**dummy.clean_environment(), **environment}
    return subprocess.Popen(mount.command(*command), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_on_a_full_disk_ends_in_one_line_and_with_room_again_as_if_nothing_had_happened(
    own, small, environment, mlflow_uri
):
    folder, key = small.place / "dummy", key_of(own, *SLOW)
    small.git("clone", "--quiet", str(own), str(folder))
    for when in ("train | step 2", "gate | gate starts"):
        process = longlora(small, folder, environment)
        read_until(process, when)
        fill(small.seen / "filler")
        out, error = process.communicate(timeout=200)
        assert process.returncode == 1
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "No space left on device" in error
        assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["FAILED"]
        (small.seen / "filler").unlink()

    again = longlora(small, folder, environment)
    out, error = again.communicate(timeout=200)
    assert (again.returncode, error) == (0, ""), out + error
    record = small.git("-C", str(folder), "rev-parse", f"refs/longlora/runs/{key}")

    process = start(own, environment, *SLOW)
    out, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, ""), out
    assert dummy.git(own, "rev-parse", f"refs/longlora/runs/{key}") == record
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["FINISHED"]


def test_a_run_whose_own_servers_database_has_no_room_ends_soon_and_goes_on_with_room_again(own, small):
    """Nothing is set: Prefect's and MLflow's databases lie on the full disk, too."""
    folder = small.place / "dummy"
    small.git("clone", "--quiet", str(own), str(folder))
    process = longlora(small, folder, {})
    read_until(process, "train | step 2")
    fill(small.seen / "filler")
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "No space left on device" in error
    assert "Traceback" not in error
    (small.seen / "filler").unlink()
    again = longlora(small, folder, {})
    out, error = again.communicate(timeout=200)
    assert (again.returncode, error) == (0, ""), out + error
    assert small.git("-C", str(folder), "rev-parse", f"refs/longlora/runs/{key_of(own, *SLOW)}")


def test_a_remote_inside_of_any_checkout_of_the_project_may_be_new(tmp_path):
    tree = tmp_path / "worktree"
    (tree / ".dvc").mkdir(parents=True)
    for address, refused in {str(tree / ".longlora/remote"): False, str(tmp_path / "share"): True}.items():
        (tree / ".dvc" / "config").write_text(f"[core]\n remote = local\n['remote \"local\"']\n url = {address}\n")
        with pytest.raises(ValueError, match="is not there") if refused else nullcontext():
            must_find_remote_folder(Project(tree=tree, root=tmp_path / "main"))


def test_a_remote_behind_a_file_is_one_line_wherever_it_is(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "file").touch()
    for address in (tmp_path / "file", tmp_path / "file" / "remote"):
        (tmp_path / ".dvc" / "config").write_text(f"[core]\n remote = local\n['remote \"local\"']\n url = {address}\n")
        for root in (tmp_path, tmp_path / "elsewhere"):
            with pytest.raises(
                ValueError, match=f"^the DVC remote {address}: {tmp_path}/file is a file, and must be a folder$"
            ):
                must_find_remote_folder(Project(tree=tmp_path, root=root))


def test_a_default_remote_that_there_is_not_is_said_by_its_name(tmp_path):
    dummy.write(tmp_path / ".dvc" / "config", "[core]\n    remote = lab\n")
    with pytest.raises(ValueError, match="^the DVC remote: the default is 'lab', and there is none of this name"):
        must_find_remote_folder(Project(tree=tmp_path, root=tmp_path))


def test_a_remote_that_dvcs_settings_can_not_name_is_one_line_with_a_way_out(tmp_path):
    for name in ("tree", "worktree"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
        (tmp_path / name / ".dvc" / "config").write_text("")
    with pytest.raises(ValueError, match=r"^DVC's settings take ASCII alone, not 'url = .*/données': name a link"):
        link(
            tmp_path / "worktree",
            to=tmp_path / "tree",
            cache_home=tmp_path / "tree",
            remote=str(tmp_path / "données"),
        )


def test_a_remote_whose_package_is_missing_is_said_before_it_is_asked(tmp_path):
    for name in ("tree", "worktree"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
        (tmp_path / name / ".dvc" / "config").write_text("")
    where = {"to": tmp_path / "tree", "cache_home": tmp_path / "tree"}
    with pytest.raises(
        ValueError, match=r"^the DVC remote: hdfs is supported, but requires 'dvc-hdfs' to be installed$"
    ):
        link(tmp_path / "worktree", **where, remote="hdfs://lab/data")
    link(tmp_path / "worktree", **where, remote=str(tmp_path / "share"))


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
