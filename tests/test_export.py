"""A model as a plain folder, whole or absent; and what may go, which never is what somebody needs."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import byhand
import dummy
import pytest

from tasks.workspace import project, record_ref

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(template, tmp_path_factory):
    """A project with three runs, its own registry: one champion, one nothing, one the newest; and their keys."""
    from tasks import promotion, runs, tracking

    home = tmp_path_factory.mktemp("lab")
    dummy.git(home, "clone", "--quiet", str(template), "dummy")
    folder = home / "dummy"
    (folder / ".longlora").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/.longlora/mlflow.db")
        keys = [byhand.run(folder, f"train.rank={rank}", tracked="dummy") for rank in (4, 5, 7)]
        client, where = tracking.connect(), project(folder)
        promotion.promote(client, where, runs.chosen(client, where, keys[0]))
    return folder, keys


@pytest.fixture
def copy(lab, tmp_path, monkeypatch):
    """The same, to be changed at will."""
    folder, keys = lab
    home = tmp_path / "dummy"
    shutil.copytree(folder, home, symlinks=True)
    for file in home.rglob("*"):  # what names the old place
        if file.is_file() and file.name in (".git", "gitdir", "config.local"):
            file.write_text(file.read_text().replace(str(folder), str(home)))
    return home, keys


def test_the_champion_or_a_run_becomes_a_folder_with_its_card(lab, tmp_path):
    folder, keys = lab
    done = dummy.longlora(folder, "export", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"champion (run {keys[0]}) is in {tmp_path / 'out'}: ")
    assert "equal to its record by hash" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"weights", "README.md", "score.png"}
    assert (tmp_path / "out" / "weights").read_text() == "b" * 4
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Dummy")
    (tmp_path / "empty").mkdir()
    assert dummy.called(folder, "export", str(tmp_path / "empty"), "--model", keys[1][:8]).returncode == 0
    assert (tmp_path / "empty" / "weights").read_text() == "b" * 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "out"]


def test_a_link_to_an_empty_folder_is_followed_and_the_current_folder_stays(lab, tmp_path, monkeypatch):
    from tasks import tracking
    from tasks.export import export

    folder, _ = lab
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/.longlora/mlflow.db")
    client, where = tracking.connect(), project(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert f"is in {tmp_path / 'link'}: " in export(client, where, tmp_path / "link", model="champion")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "weights").read_text() == "b" * 4
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"^\. is the current folder, which cannot be replaced: name a folder in it"):
        export(client, where, Path("."), model="champion")


def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(copy, tmp_path):
    folder, keys = copy

    def said(*arguments: str) -> str:
        done = dummy.called(folder, "export", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        return done.stderr

    full, target = tmp_path / "full", tmp_path / "target"
    dummy.write(full / "mine", "keep")
    assert "is not empty: a model is exported to a new or empty folder" in said(str(full))
    assert (full / "mine").read_text() == "keep"
    assert "is a file: a model is exported to a new or empty folder" in said(str(full / "mine"))
    assert "no run 'nobody'" in said(str(target), "--model", "nobody")
    assert "no config.json there" in said(str(target), "--gguf")  # the dummy's record is fetched, and is no model
    assert "no run 'nobody'" in said(str(target), "--gguf", "--model", "nobody")
    # a byte turned in the only copies
    for store in (folder / ".dvc" / "cache", folder / ".longlora" / "remote"):
        for file in store.rglob("*"):
            if file.is_file() and file.read_bytes() == b"b" * 7:
                file.chmod(0o644)
                file.write_bytes(b"bbbBbbb")
    assert "damaged" in said(str(target), "--model", keys[2]) or "is not in" in said(str(target), "--model", keys[2])
    assert not target.exists()
    assert not list(tmp_path.glob(".target*"))


class Hub:
    """What stands in for the hub's client: what it was asked for."""

    asked: ClassVar[list[tuple[str, dict]]] = []
    error: Exception | None = None

    def __getattr__(self, name):
        def ask(*args, **kw):
            if self.error and name != "whoami":
                raise self.error
            self.asked.append((name, {"args": args, **kw} if args else kw))
            return "https://huggingface.co/lab/mine"

        return ask


@pytest.fixture
def hub(monkeypatch):
    from tasks import hub

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "error", None)
    return hub


def test_an_exported_model_is_uploaded_to_a_private_repository(hub, tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "mine.gguf"
    folder.mkdir()
    file.touch()
    hub.must_be_open("lab/mine")
    assert hub.upload("lab/mine", folder) == hub.upload("lab/mine", file) == "https://huggingface.co/lab/mine"
    made = ("create_repo", {"args": ("lab/mine",), "private": True, "exist_ok": True})
    assert Hub.asked == [
        ("whoami", {}),
        made,
        ("upload_folder", {"repo_id": "lab/mine", "folder_path": folder}),
        made,
        ("upload_file", {"repo_id": "lab/mine", "path_or_fileobj": file, "path_in_repo": "mine.gguf"}),
    ]
    Hub.error = OSError("403 Forbidden:\n you may not")
    with pytest.raises(ValueError, match="^--hub lab/mine: 403 Forbidden: you may not$"):
        hub.upload("lab/mine", folder)


def test_an_upload_that_can_not_be_is_refused_in_one_line_before_anything_is_exported(lab, hub, tmp_path, monkeypatch):
    done = dummy.longlora(lab[0], "export", str(tmp_path / "out"), "--hub", "lab/mine")  # the tests are offline
    assert (done.returncode, done.stderr) == (
        1,
        "error: --hub lab/mine: HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it\n",
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="^--hub mine: must be OWNER/NAME, such as lab/longlora-16k$"):
        hub.must_be_open("mine")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="^--hub lab/mine: nobody is logged in to the hub: `hf auth login`"):
        hub.must_be_open("lab/mine")


def test_the_hub_gets_what_was_exported(hub, lab, tmp_path, monkeypatch):
    from flows.cli.export import export

    monkeypatch.chdir(lab[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{lab[0]}/.longlora/mlflow.db")
    said = export(tmp_path / "out", model="champion", gguf=False, dtype=None, hub="lab/mine")
    assert said.splitlines()[1:] == ["https://huggingface.co/lab/mine has it"]
    assert Hub.asked[-1] == ("upload_folder", {"repo_id": "lab/mine", "folder_path": tmp_path / "out"})
    assert (tmp_path / "out" / "weights").read_text() == "b" * 4
    monkeypatch.setattr(Hub, "error", OSError("403 Forbidden"))
    with pytest.raises(ValueError, match=r"403 Forbidden\. .*/two is written: `hf upload lab/mine .*/two` uploads it$"):
        monkeypatch.setattr(hub, "must_be_open", lambda name: None)
        export(tmp_path / "two", model="champion", gguf=False, dtype=None, hub="lab/mine")
    assert (tmp_path / "two" / "weights").exists()


def test_gc_by_its_command_deletes_when_told_to_and_keeps_the_champion(lab, copy):
    folder, (champion, old, newest) = copy
    dummy.git(folder, "remote", "add", "lab", str(lab[0]))  # where the registry's version points to
    asked = folder / ".longlora" / "asked" / "4567"
    dummy.write(asked / "model" / "weights", "x" * 500)
    for path in (asked / "model" / "weights", asked / "model", asked):
        os.utime(path, (0, 0))
    listed = dummy.called(folder, "gc", "--keep", "1")
    assert listed.returncode == 0, listed.stderr
    assert asked.exists() and (folder / ".longlora" / "worktrees" / old).exists()
    done = dummy.called(folder, "gc", "--keep", "1", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:-1] == listed.stdout.splitlines()[:-1]
    assert done.stdout.splitlines()[-1] == "deleted"
    assert {path.name for path in (folder / ".longlora" / "worktrees").iterdir()} == {champion, newest}
    assert not asked.exists()
    assert dummy.called(folder, "gc", "--keep", "1").stdout == "nothing may go\n"


def test_gc_lists_first_and_deletes_what_nobody_needs(copy, tmp_path):
    folder, (champion, old, newest) = copy
    notes = folder / ".longlora" / "checkpoints"
    dummy.write(notes / "0123" / "step-1" / "weights", "x" * 1000)
    (notes / "0123.lock").touch()
    asked = folder / ".longlora" / "asked"
    for name in ("4567", "4567-x.partial"):
        dummy.write(asked / name / "model" / "weights", "x" * 500)
    cache = folder / ".dvc" / "cache" / "files" / "md5"
    weights = {file.read_text(): file for file in cache.rglob("*") if file.is_file() and "b" * 4 in file.read_text()}
    before = {file for file in folder.rglob("*") if file.is_file()}

    young = dummy.called(folder, "gc", "--keep", "1")
    assert young.returncode == 0, young.stderr
    assert f"worktrees/{old}" in young.stdout
    assert young.stdout.endswith("nothing was deleted: `longlora gc --keep 1 --yes` deletes it\n")
    for recent in ("checkpoints/0123", "asked/4567", "objects"):  # written within the hour
        assert recent not in young.stdout
    assert before <= {file for file in folder.rglob("*") if file.is_file()}

    os.utime(notes / "0123" / "step-1" / "weights", (0, 0))
    for path in (notes / "0123" / "step-1", notes / "0123"):
        os.utime(path, (0, 0))
    said = dummy.called(folder, "gc", "--keep", "1").stdout
    assert "left, for trainings that did not end go on from there: 0.001 MB of checkpoints (--checkpoints)\n" in said
    told = dummy.called(folder, "gc", "--keep", "1", "--checkpoints").stdout
    assert "checkpoints/0123" in told and told.endswith("`longlora gc --keep 1 --checkpoints --yes` deletes it\n")
    where = project(folder)
    from tasks import leftovers
    from tasks.storage import recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers, "YOUNG", -5.0)
        kept = leftovers.leftovers(where, keep=1, versions={recorded(where)[champion]})
        assert "checkpoints" not in {
            each.kind for each in kept
        }  # whatever finished after the run that may go on from them
        found = leftovers.leftovers(where, keep=1, versions={recorded(where)[champion]}, checkpoints=True)
        assert {each.kind for each in found} == {"worktree", "checkpoints", "cache", "model"}
        assert [each.size for each in found] == sorted((each.size for each in found), reverse=True)
        leftovers.remove(where, found)
        assert leftovers.leftovers(where, keep=1, versions={recorded(where)[champion]}, checkpoints=True) == []
    assert not weights["bbbbb"].exists() and weights["bbbb"].exists() and weights["b" * 7].exists()
    folders = {path.name for path in (folder / ".longlora" / "worktrees").iterdir()}
    assert folders == {champion, newest}
    assert not (notes / "0123").exists() and (notes / "executions").exists()
    assert (notes / "0123.lock").exists() and list(asked.iterdir()) == []

    # what went can be brought back from the remote, what stayed needs no remote
    assert dummy.called(folder, "reproduce", old).returncode == 0
    shutil.rmtree(folder / ".longlora" / "remote")
    for key in (champion, newest):
        assert dummy.called(folder, "reproduce", key).returncode == 0
    assert dummy.called(folder, "export", str(tmp_path / "out")).returncode == 0


def test_gc_keeps_every_recorded_run_where_the_cache_is_the_only_copy(copy):
    from tasks import leftovers

    folder, _ = copy
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers, "YOUNG", -5.0)
        assert [each.kind for each in leftovers.leftovers(project(folder), keep=0, versions=set())] == []


def test_gc_leaves_a_cache_outside_of_the_project_alone_and_says_so(copy, tmp_path):
    from tasks import leftovers

    folder, _ = copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers, "YOUNG", -5.0)
        assert "cache" in {each.kind for each in leftovers.leftovers(project(folder), keep=0, versions=set())}
        (folder / ".dvc" / "cache").rename(tmp_path / "shared")
        (folder / ".dvc" / "cache").symlink_to(tmp_path / "shared")
        assert "cache" not in {each.kind for each in leftovers.leftovers(project(folder), keep=0, versions=set())}
        (folder / ".dvc" / "cache").unlink()
        dummy.write(folder / ".dvc" / "config.local", f"[cache]\n    dir = {tmp_path / 'shared'}\n")
        assert "cache" not in {each.kind for each in leftovers.leftovers(project(folder), keep=0, versions=set())}
    said = dummy.called(folder, "gc", "--keep", "0").stdout
    assert f"left, for other projects may share it: {tmp_path / 'shared'} (DVC's cache.dir" in said


def test_gc_finds_what_is_tracked_under_a_name_beyond_ascii(folder):
    from tasks import leftovers

    dummy.write(folder / "données" / "é.txt.dvc", f"outs:\n- md5: {'a' * 32}\n")
    where = project(folder)
    assert leftovers.named_on_disk(where, set()) == {"a" * 32}
    dummy.commit(folder)
    assert leftovers.named_in_git(where, set(), set()) == {"a" * 32}
    (folder / "données" / "é.txt.dvc").unlink()
    assert leftovers.named_on_disk(where, set()) == set()


def test_gc_deletes_nothing_of_a_run_at_work_nor_what_a_branch_names(copy):
    from tasks import leftovers
    from tasks.locks import hold

    folder, (_, old, _) = copy
    where = project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers, "YOUNG", -5.0)
        with hold(where, old):
            found = leftovers.leftovers(where, keep=0, versions=set())
            assert not any(old in str(path) for each in found for path in each.paths)
            assert {each.kind for each in found} == {"worktree"}
        again = folder / ".longlora" / "worktrees" / f"{old}-again"
        dummy.write(again / "models" / "tuned" / "weights", "bbbbb")
        with hold(where, again.name):  # as it is computed again
            found = leftovers.leftovers(where, keep=0, versions=set())
            assert not any(again in each.paths for each in found)
            assert {each.kind for each in found} == {"worktree"}
        assert any(again in each.paths for each in leftovers.leftovers(where, keep=0, versions=set()))
        dummy.git(folder, "branch", "mine", record_ref(old))
        (cached,) = [each for each in leftovers.leftovers(where, keep=0, versions=set()) if each.kind == "cache"]
        assert not any(Path(path).read_text() == "b" * 5 for path in cached.paths)
        with pytest.raises(ValueError, match="a registered version points to 0123456789ab"):
            leftovers.leftovers(where, keep=0, versions={"0123456789ab" + "0" * 28})
    with pytest.raises(ValueError, match="--keep -1: must be 0 or more"):
        leftovers.leftovers(where, keep=-1, versions=set())


def test_gc_neither_waits_for_a_run_that_began_since_it_looked_nor_deletes_its_folder(folder, capsys):
    from tasks import leftovers
    from tasks.locks import hold

    where, work = project(folder), folder / ".longlora" / "worktrees" / "0123"
    dummy.write(work / "models" / "tuned", "weights")
    with hold(where, work.name):
        gc = threading.Thread(target=leftovers.remove_folder, args=(where, work, []), daemon=True)
        gc.start()
        gc.join(10)
        assert not gc.is_alive() and work.exists()
    assert capsys.readouterr().out == ""
    leftovers.remove_folder(where, work, [])
    assert not work.exists()


def test_gc_deletes_no_checkpoints_if_a_run_began_since_it_looked(folder, capsys):
    from tasks.leftovers import Leftover, remove
    from tasks.locks import hold

    where, checkpoints = project(folder), folder / ".longlora" / "checkpoints" / "abc"
    dummy.write(checkpoints / "step", "weights")
    (folder / ".longlora" / "worktrees" / "0123").mkdir(parents=True)
    found = [Leftover("checkpoints", (checkpoints,), 7, "of what did not end, and would begin anew")]
    with hold(where, "0123"):
        remove(where, found)
    said = "left, for a run began meanwhile: checkpoints of what did not end, and would begin anew\n"
    assert capsys.readouterr().out == said
    assert checkpoints.exists()
    remove(where, found)
    assert not checkpoints.exists()


def test_gc_deletes_nothing_of_the_cache_if_a_run_began_since_it_looked(folder, capsys):
    from tasks.leftovers import Leftover, remove
    from tasks.locks import hold

    where, file = project(folder), folder / ".dvc" / "cache" / "files" / "md5" / "01" / "23"
    dummy.write(file, "weights")
    (folder / ".longlora" / "worktrees" / "0123").mkdir(parents=True)
    found = [Leftover("cache", (file,), 7, "1 object that no kept run has")]
    with hold(where, "0123"):
        remove(where, found)
    assert capsys.readouterr().out == "left, for a run began meanwhile: 1 object that no kept run has\n"
    assert file.exists()
    remove(where, found)
    assert not file.exists()


def test_gc_deletes_the_locks_of_flow_runs_that_ended_and_no_other(folder, capsys):
    from flows.cli.listing import show_leftovers
    from tasks.leftovers import leftovers, remove
    from tasks.locks import hold, is_held

    where, locks = project(folder), folder / ".longlora" / "locks"
    for name in ("flow-1", "flow-2", "flow-3", "gc"):
        with hold(where, name):
            pass
    with hold(where, "flow-1"):
        found = leftovers(where, keep=5, versions=set())
        assert [(each.kind, each.paths) for each in found] == [
            ("locks", (locks / "flow-2.lock", locks / "flow-3.lock"))
        ]
        show_leftovers(found, where)
        assert capsys.readouterr().out.splitlines()[1].split()[2:4] == ["locks", ".longlora/locks"]
        with hold(where, "flow-2"):  # taken since they were listed
            remove(where, found)
            assert is_held(where, "flow-1") and is_held(where, "flow-2")
    assert {path.name for path in locks.iterdir()} == {"flow-1.lock", "flow-2.lock", "gc.lock"}


READER = """
import os, sys
from pathlib import Path
from flows.cli.ask import fetched, model_folder
model_folder(sys.argv[1])
fetched("dvc://tiny/model?rev=4567", home=Path(".longlora/asked"))
print("reading", flush=True)
os.execvp("cat", ["cat"])
"""


def test_gc_leaves_what_a_server_reads_from_says_so_and_deletes_it_next_time(copy):
    from tasks import leftovers

    folder, (_, old, _) = copy
    model = folder / ".longlora" / "asked" / "4567"
    dummy.write(model / "model" / "config.json", "{}")
    work = folder / ".longlora" / "worktrees" / old
    where, before = project(folder), list(leftovers.being_read(project(folder)))
    command = [sys.executable, "-c", READER, str(work / "models" / "tuned")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers, "YOUNG", -5.0)
        listed = leftovers.leftovers(where, keep=1, versions=set())
        assert {work, model} <= {path for each in listed for path in each.paths}
        server = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with server:
            assert server.stdout.readline() == "reading\n"
            assert list(leftovers.being_read(where)) == [work, model]
            leftovers.remove(where, [each for each in listed if each.kind != "cache"])  # it was listed before
            found = {path for each in leftovers.leftovers(where, keep=1, versions=set()) for path in each.paths}
            assert not {work, model} & found
            assert (work / "models" / "tuned" / "weights").exists() and (model / "model" / "config.json").exists()
            said = dummy.longlora(folder, "gc", "--keep", "1", "--yes").stdout
            for path in (work, model):
                assert f"left, for a process reads from it: {path.relative_to(folder)}\n" in said and path.exists()
            server.stdin.close()
        leftovers.remove(where, leftovers.leftovers(where, keep=1, versions=set()))
    assert before == []
    assert not work.exists() and not model.exists()
