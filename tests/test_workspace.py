"""Snapshots, worktrees and locks, on real git."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dummy
import pytest
import yaml

from tasks import workspace
from tasks.locks import delete, file_of, hold, is_held
from tasks.workspace import files_now, person, project, record_ref, snapshot, worktree


def test_a_clean_checkout_is_its_own_snapshot(folder):
    state = snapshot(project(folder))
    assert state.commit == state.head == dummy.git(folder, "rev-parse", "HEAD")
    assert dummy.git(folder, "rev-parse", "HEAD^{tree}").startswith(state.key)
    assert (state.dirty, state.branch) == (False, "main")


def test_the_same_content_is_the_same_run_whoever_asks(folder, template):
    ours = snapshot(project(folder), overrides=["train.rank=9"])
    theirs = snapshot(project(template), overrides=["train.rank=9"])
    assert (ours.key, ours.commit) == (theirs.key, theirs.commit)
    assert snapshot(project(folder), overrides=["train.rank=8"]).key == snapshot(project(folder)).key  # as it was
    assert snapshot(project(folder), recipe="big").key != snapshot(project(folder)).key


@pytest.mark.parametrize(
    ("recipe", "overrides", "models"),
    [
        (None, [], "[champion]"),
        (None, ["rivals.models=[mine]"], "[mine, champion]"),
        (None, ["rivals.models="], "[champion]"),
        (None, ["rivals.models=[champion, mine]"], "[champion, mine]"),
        ("two", [], "[one, champion]"),
    ],
)
def test_what_stands_beside_stands_after_what_the_user_has_there(folder, recipe, overrides, models):
    dummy.write(folder / "recipes" / "two.yaml", "rivals: {models: [one]}\n")
    added = [workspace.Addition(appended={"rivals.models": "champion"}, files={"rivals/champion.dvc": "outs: []\n"})]
    state = snapshot(project(folder), recipe=recipe, overrides=overrides, additions=added)
    params = yaml.safe_load(dummy.git(folder, "show", f"{state.commit}:params.yaml"))
    assert params["rivals"]["models"] == yaml.safe_load(models)
    assert dummy.git(folder, "show", f"{state.commit}:rivals/champion.dvc") == "outs: []"
    assert set(state.overrides) == {*overrides, f"rivals.models={models}"}


def test_a_list_that_is_none_is_named(folder):
    for key, said in (("rivals.modles", "^unknown key 'rivals.modles'"), ("train.rank", "must be a number")):
        with pytest.raises(ValueError, match=said):
            snapshot(project(folder), additions=[workspace.Addition(appended={key: "champion"})])


def test_a_file_whose_name_is_no_text_is_part_of_a_snapshot(folder):
    odd = os.path.join(os.fsencode(folder), b"caf\xe9")
    with open(odd, "wb") as file:
        file.write(b"old coffee")
    state = snapshot(project(folder))
    found = worktree(project(folder), state)
    with open(os.path.join(os.fsencode(found), b"caf\xe9"), "rb") as file:
        assert file.read() == b"old coffee"


def test_a_snapshot_has_every_change_and_touches_nothing(folder):
    (folder / "dummy" / "new.py").write_text("new")
    (folder / "recipes" / "big.yaml").unlink()
    (folder / "dummy" / "stage.py").write_text("changed")
    dummy.git(folder, "add", "dummy/stage.py")
    (folder / "dummy" / "stage.py").write_text("changed again")
    (folder / "models").mkdir()
    (folder / "models" / "ignored").touch()
    (folder / "dvc.lock").write_text("a run's result")
    before = (
        dummy.git(folder, "status", "--porcelain"),
        dummy.git(folder, "diff", "--cached"),
        dummy.git(folder, "stash", "list"),
    )

    state = snapshot(project(folder), overrides=["train.rank=9"])

    assert state.dirty
    after = (
        dummy.git(folder, "status", "--porcelain"),
        dummy.git(folder, "diff", "--cached"),
        dummy.git(folder, "stash", "list"),
    )
    assert after == before
    changed = dummy.git(folder, "diff", "--name-status", "HEAD", state.commit).splitlines()
    assert changed == ["A\tdummy/new.py", "M\tdummy/stage.py", "M\tparams.yaml", "D\trecipes/big.yaml"]
    assert dummy.git(folder, "show", f"{state.commit}:dummy/stage.py") == "changed again"


def test_overrides_alone_do_not_make_it_dirty(folder):
    assert not snapshot(project(folder), overrides=["train.rank=9"]).dirty


def test_a_file_too_large_for_git_is_refused_before_it_is_stored(folder):
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(workspace.LARGEST_UNTRACKED + 1)
    with pytest.raises(ValueError, match=r"weights.bin has 50 MB: new files up to 50 MB"):
        snapshot(project(folder))


def test_snapshots_of_files_as_they_were_need_nothing_of_what_is_there_now(folder):
    dummy.write(folder / ".git" / "info" / "exclude", "/recipes/own.yaml\n")
    dummy.write(folder / "recipes" / "own.yaml", "train: {rank: 16}\n")
    dummy.write(folder / "sources.yaml", "train: {}\n")
    where = project(folder)
    before, files = snapshot(where, recipe="own"), files_now(where, recipe="own")
    shutil.rmtree(folder / "recipes")
    dummy.write(folder / "params.yaml", "no: {such: 1}\n")
    (folder / "sources.yaml").unlink()
    dummy.commit(folder)
    assert snapshot(where, recipe="own", files=files) == before
    (folder / "params.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ValueError, match="params.yaml must be text in UTF-8: byte 6 is none"):
        files_now(where)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("data", lambda path: dummy.write(path / "two.txt", "two")),
        ("data", shutil.rmtree),
        ("later", lambda path: dummy.write(path / "one.txt", "one")),
    ],
    ids=["more", "gone", "new"],
)
def test_files_as_they_were_are_no_snapshot_once_data_is_not_what_it_was(folder, tmp_path, name, change):
    named = f"rank: 8, data: {tmp_path / 'data'}, more: {tmp_path / 'later'},"
    dummy.write(folder / "params.yaml", dummy.PARAMS.lstrip().replace("rank: 8,", named))
    dummy.write(folder / "sources.yaml", "train: {}\n")
    dummy.write(tmp_path / "data" / "one.txt", "one")
    where = project(folder)
    files = files_now(where)
    first = snapshot(where, files=files)
    assert snapshot(where, files=files) == first
    change(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: its data is not what it was at the start"):
        snapshot(where, files=files, overrides=["train.rank=9"])
    assert snapshot(where).key != first.key


def test_a_worktree_that_another_run_is_just_making_is_in_nobodys_way(folder, tmp_path):
    dummy.git(folder, "worktree", "add", "--detach", "--quiet", str(tmp_path / "other"))
    (folder / ".git/worktrees/other/HEAD").write_text("0" * 40 + "\n")  # what git itself puts there first
    assert project(folder).tree == folder


def test_a_detached_checkout_without_any_branch_is_a_project(folder):
    dummy.git(folder, "checkout", "--quiet", "--detach")
    for ref in dummy.git(folder, "for-each-ref", "--format=%(refname)").splitlines():
        dummy.git(folder, "update-ref", "-d", ref)
    assert project(folder).tree == folder


def test_what_is_no_project_is_said_in_one_line(tmp_path, folder):
    with pytest.raises(ValueError, match="not in a git repository"):
        project(tmp_path)
    dummy.git(folder, "rm", "--quiet", "dvc.yaml")
    with pytest.raises(ValueError, match=r"has no dvc.yaml"):
        project(folder)
    (folder / "dvc.yaml").mkdir()
    with pytest.raises(ValueError, match=rf"^{folder}/dvc.yaml is a folder, and must be a file$"):
        project(folder)
    (folder / "dvc.yaml").rmdir()
    empty = tmp_path / "empty"
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        dummy.write(empty / name, "")
    dummy.git(empty, "init", "--quiet")
    with pytest.raises(ValueError, match="has no commit yet"):
        project(empty)
    dummy.git(folder, "reset", "--quiet", "--hard")
    dummy.write(folder / ".longlora", "")
    with pytest.raises(ValueError, match=rf"^{folder}/\.longlora is a file, and must be a folder"):
        project(folder)


def test_worktrees_share_the_main_checkouts_state(folder):
    dummy.git(folder, "worktree", "add", "--quiet", "../other")
    where = project(folder.parent / "other" / "dummy")
    assert (where.tree, where.root) == (folder.parent / "other", folder)


def test_a_worktree_is_the_snapshot_whatever_was_done_to_it(folder):
    where = project(folder)
    state = snapshot(where, overrides=["train.rank=9"])
    made = worktree(where, state)
    assert "rank: 9" in (made / "params.yaml").read_text()
    (made / "dummy" / "stage.py").write_text("edited")
    (made / "params.yaml").unlink()
    (made / "dvc.lock").write_text("what an attempt before wrote")
    index_lock = folder / ".git" / "worktrees" / state.key / "index.lock"
    index_lock.touch()  # as a killed git leaves it
    assert worktree(where, state) == made
    assert (made / "dummy" / "stage.py").read_text() == dummy.FILES["dummy/stage.py"]
    assert "rank: 9" in (made / "params.yaml").read_text()
    assert (made / "dvc.lock").read_text() == "what an attempt before wrote"
    assert dummy.git(folder, "status", "--porcelain") == ""


def test_a_worktree_has_the_bytes_that_are_stored_whatever_ends_of_lines_the_user_wants(folder):
    dummy.git(folder, "config", "core.autocrlf", "true")
    for _ in range(2):  # made, and found again
        work = worktree(project(folder), snapshot(project(folder)))
        assert b"\r" not in (work / "dummy" / "stage.py").read_bytes()
        (work / "dummy" / "stage.py").unlink()
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text, newline="\r\n")
    assert snapshot(project(folder)).dirty is False


def test_a_half_made_worktree_is_made_anew(folder):
    where = project(folder)
    state = snapshot(where)
    half = where.state / "worktrees" / state.key
    dummy.write(half / "params.yaml", "half")
    assert (worktree(where, state) / "params.yaml").read_text() == dummy.FILES["params.yaml"]


HOLDER = """
import sys, time
from pathlib import Path
from tasks.locks import hold
from tasks.workspace import project
with hold(project(Path(sys.argv[1])), "key"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_of_a_key_at_a_time_and_death_frees_it(folder, capsys):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with hold(project(folder), "another key"):
            pass
        assert capsys.readouterr().out == ""
        started = time.monotonic()
        subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({other.pid}, {int(signal.SIGKILL)})"]
        )
        with hold(project(folder), "key"):
            assert time.monotonic() - started > 0.5
        assert capsys.readouterr().out == "waiting: another process works on key\n"
    finally:
        other.kill()
        other.wait()


def test_who_waits_for_a_lock_whose_file_is_deleted_meanwhile_holds_the_new_one(folder):
    where = project(folder)
    with hold(where, "key"):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "waiting: another process works on key\n"
        time.sleep(0.5)  # it has the old file open by now
        file_of(where, "key").unlink()  # as `delete` does under the lock
    try:
        assert other.stdout.readline() == "held\n"
        assert is_held(where, "key")
        delete(where, "key")  # nothing, for it is held
        assert is_held(where, "key")
    finally:
        other.kill()
        other.wait()
    delete(where, "key")
    assert not file_of(where, "key").exists() and not is_held(where, "key")


def test_the_recorded_lock_is_where_a_new_worktree_starts(folder):
    from tasks.storage import record

    where = project(folder)
    state = snapshot(where)
    first = worktree(where, state)
    (first / "dvc.lock").write_text("schema: '2.0'\n")
    commit = record(where, state, first)
    assert record(where, state, first) == commit  # the same lock, the same commit
    assert dummy.git(folder, "diff", "--name-only", state.commit, commit) == "dvc.lock"
    dummy.git(folder, "worktree", "remove", "--force", str(first))
    assert (worktree(where, state) / "dvc.lock").read_text() == "schema: '2.0'\n"
    assert os.path.exists(folder / ".git")


def recorded_with(folder, lock: str) -> str:
    """The record of a run of `folder`, as if its stages had left this dvc.lock."""
    from tasks.storage import record

    where = project(folder)
    state = snapshot(where)
    work = worktree(where, state)
    (work / "dvc.lock").write_text(lock)
    return record(where, state, work)


def test_the_same_files_and_lock_keep_their_record_on_whatever_commit(folder):
    dummy.write(folder / "new", "not committed yet")
    first = recorded_with(folder, "schema: '2.0'\n")
    dummy.commit(folder)
    assert recorded_with(folder, "schema: '2.0'\n") == first
    dummy.git(folder, "commit", "--quiet", "--amend", "--message", "in other words")
    assert recorded_with(folder, "schema: '2.0'\n") == first
    other = recorded_with(folder, "schema: '2.0'\nstages: {}\n")  # data outside of git has changed
    assert dummy.git(folder, "rev-parse", record_ref(snapshot(project(folder)).key)) == other != first
    dummy.git(folder, "worktree", "remove", "--force", f".longlora/worktrees/{snapshot(project(folder)).key}")
    dummy.git(folder, "reflog", "expire", "--expire=now", "--all")
    dummy.git(folder, "gc", "--quiet", "--prune=now")
    assert dummy.git(folder, "show", f"{first}:dvc.lock") == "schema: '2.0'"


def test_what_a_killed_git_left_of_its_locks_does_not_keep_a_record_from_being_made_again(folder):
    commit = recorded_with(folder, "schema: '2.0'\n")
    key = snapshot(project(folder)).key
    for ref in (f"refs/longlora/records/{commit}", record_ref(key)):
        (folder / ".git" / f"{ref}.lock").touch()
    assert recorded_with(folder, "schema: '2.0'\n") == commit
    assert not list((folder / ".git" / "refs").rglob("*.lock"))


def test_a_published_record_can_be_fetched_after_another_clone_published_the_same_run(folder, tmp_path, monkeypatch):
    from tasks.storage import kept_ref, publish

    dummy.git(tmp_path, "init", "--quiet", "--bare", "shared.git")
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", str(tmp_path / "shared.git"))
    dummy.git(tmp_path, "clone", "--quiet", str(folder), "other")
    dummy.git(tmp_path / "other", "commit", "--quiet", "--allow-empty", "--message", "another parent")
    key, commits = snapshot(project(folder)).key, []
    for clone in (folder, tmp_path / "other"):
        commits.append(recorded_with(clone, "schema: '2.0'\n"))
        publish(project(clone), key, commits[-1])
    assert commits[0] != commits[1]
    dummy.git(tmp_path / "shared.git", "gc", "--quiet", "--prune=now")
    dummy.git(tmp_path, "init", "--quiet", "third")
    for commit in commits:
        dummy.git(
            tmp_path / "third", "fetch", "--quiet", "--depth=1", f"file://{tmp_path}/shared.git", kept_ref(commit)
        )
        assert dummy.git(tmp_path / "third", "show", f"{commit}:dvc.lock") == "schema: '2.0'"


def test_a_git_remote_that_would_not_take_the_record_is_said_before_and_is_sent_nothing(folder, tmp_path, monkeypatch):
    from tasks.storage import must_take

    where = project(folder)
    dummy.git(tmp_path, "init", "--quiet", "--bare", "shared.git")
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", str(tmp_path / "shared.git"))
    must_take(where, snapshot(where))
    assert not dummy.git(tmp_path / "shared.git", "for-each-ref")
    nowhere = f"file://ada:SECRET@localhost{tmp_path}/nowhere.git"
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", nowhere)
    with pytest.raises(ValueError, match=r"^LONGLORA_GIT_REMOTE=file://localhost/.*nowhere.git: git push: ") as caught:
        must_take(where, snapshot(where))
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("ssh://git:pw@host/x.git", "ssh://git@host/x.git"),
        ("ssh://git@host:2222/x.git", "ssh://git@host:2222/x.git"),
        ("git@host:x.git", "git@host:x.git"),
        ("https://ada:pw@host/x.git?token=T", "https://host/x.git"),
        ("https://host/x.git?token=T", "https://host/x.git"),
        ("postgresql+psycopg2://lab:pw@host/mlflow?sslmode=require", "postgresql+psycopg2://host/mlflow"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("/home/me/a?b@c", "/home/me/a?b@c"),
    ],
)
def test_an_address_is_kept_without_secrets_and_yet_leads_there(address, kept):
    from tasks.storage import without_credentials

    assert without_credentials(address) == kept


@pytest.mark.parametrize("hook", ["post-checkout", "pre-push"])
def test_the_user_s_hooks_have_no_part_in_a_run(folder, tmp_path, monkeypatch, hook):
    from tasks.storage import publish, record

    script = folder / ".git" / "hooks" / hook
    dummy.write(script, "#!/bin/sh\nexit 1\n")  # as git-lfs's where git-lfs is missing
    script.chmod(0o755)
    dummy.git(tmp_path, "init", "--quiet", "--bare", "bare.git")
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", str(tmp_path / "bare.git"))
    where = project(folder)
    state = snapshot(where)
    made = worktree(where, state)
    assert worktree(where, state) == made
    dummy.write(made / "dvc.lock", "schema: '2.0'\n")
    commit = record(where, state, made)
    publish(where, state.key, commit)
    assert dummy.git(tmp_path / "bare.git", "rev-parse", f"refs/longlora/runs/{state.key}") == commit


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="signs with ssh-keygen")
def test_a_signed_commit_whose_signature_git_shows_is_a_start_as_any(folder, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    for name, value in {
        "gpg.format": "ssh",
        "user.signingKey": str(tmp_path / "key"),
        "log.showSignature": "true",
    }.items():
        dummy.git(folder, "config", name, value)
    dummy.git(folder, "commit", "--quiet", "--allow-empty", "--gpg-sign", "--message", "signed")
    state = snapshot(project(folder), overrides=["train.rank=9"])
    assert dummy.git(folder, "rev-parse", f"{state.commit}^") == state.head


def test_the_root_is_the_main_checkout_or_the_tree_itself(folder, template, tmp_path):
    def run(*arguments: str) -> None:
        dummy.git(tmp_path, "-c", "protocol.file.allow=always", *arguments)

    run("init", "--quiet", "above")
    run("-C", "above", "submodule", "--quiet", "add", str(template), "below")
    run("-C", "above/below", "worktree", "add", "--quiet", "--detach", str(tmp_path / "of_submodule"))
    run("clone", "--quiet", "--separate-git-dir", str(tmp_path / "apart.git"), str(template), "apart")
    run("clone", "--quiet", "--bare", str(template), "bare/.git")
    run("-C", "bare/.git", "worktree", "add", "--quiet", "--detach", str(tmp_path / "of_bare"))
    run("-C", "dummy", "worktree", "add", "--quiet", "--detach", str(tmp_path / "of_dummy"))
    names = {name: name for name in ("above/below", "of_submodule", "apart", "of_bare")} | {"of_dummy": "dummy"}
    for tree, root in names.items():
        where = project(tmp_path / tree)
        assert (where.tree, where.root) == (tmp_path / tree, tmp_path / root)
        assert worktree(where, snapshot(where)).is_relative_to(tmp_path / root / ".longlora")


def test_who_is_at_work_always_has_a_name(folder, monkeypatch):
    monkeypatch.setenv("USER", "")
    dummy.git(folder, "config", "user.name", "")
    assert person(project(folder)) == "unknown"
    monkeypatch.setenv("USER", "jo")
    assert person(project(folder)) == "jo"
    dummy.git(folder, "config", "user.name", "Jo Doe")
    assert person(project(folder)) == "Jo Doe"


def test_a_hook_s_own_repository_is_not_taken_for_the_folder_s(folder, template, monkeypatch):
    for name, value in {
        "GIT_DIR": template / ".git",
        "GIT_INDEX_FILE": template / ".git" / "index",
        "GIT_PREFIX": "x",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "0")
    where = project(folder)
    assert (where.tree, where.root) == (folder, folder)
    assert snapshot(where, overrides=["train.rank=9"]).head == dummy.git(folder, "rev-parse", "HEAD")
    assert not {"GIT_DIR", "GIT_INDEX_FILE", "GIT_PREFIX"} & os.environ.keys()  # nor by DVC and the stages
    assert "GIT_CONFIG_COUNT" in os.environ


def test_a_repository_that_git_does_not_trust_is_said_with_git_s_remedy(folder, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own, for its tests
    with pytest.raises(
        ValueError, match=f"^git rev-parse: detected dubious ownership in repository at '{folder}'"
    ) as said:
        project(folder)
    assert f"git config --global --add safe.directory {folder}" in str(said.value)
    assert "\n" not in str(said.value)


def test_what_git_cannot_store_is_said_with_the_cause(folder):
    dummy.git(folder, "init", "--quiet", "inner")
    said = r"^git add: (adding|updating) files failed \('inner/' does not have a commit checked out\)$"
    with pytest.raises(ValueError, match=said):
        snapshot(project(folder))


def test_what_a_shell_or_mlflow_leaves_in_the_project_is_no_part_of_a_run():
    here = Path(__file__).parent.parent
    left = ["nohup.out", "run.log", "mlflow.db", "mlruns"]
    assert dummy.git(here, "check-ignore", "--no-index", *left).splitlines() == left


def test_a_worktree_on_a_drive_that_is_away_is_kept_and_one_that_was_cut_off_is_made_anew(folder, tmp_path):
    from tasks.leftovers import Leftover, remove

    dummy.git(folder, "worktree", "add", "--quiet", "--detach", str(tmp_path / "drive"))
    (tmp_path / "drive").rename(tmp_path / "away")
    where = project(folder)
    state = snapshot(where)
    made = worktree(where, state)
    entry = folder / ".git" / "worktrees" / state.key
    (entry / "locked").write_text("initializing")  # as a killed git leaves it
    shutil.rmtree(made)
    assert worktree(where, state) == made
    remove(where, [Leftover("worktree", (made,), 1, "old")])
    assert not made.exists() and not entry.exists()
    (tmp_path / "away").rename(tmp_path / "drive")
    assert dummy.git(tmp_path / "drive", "rev-parse", "HEAD") == state.head


@pytest.mark.parametrize("name", ["dvc_plots/index.html", "experiments/dvc_plots/index.html", "mlruns/0/meta.yaml"])
def test_what_dvcs_and_mlflows_own_commands_leave_in_the_tree_makes_no_other_run(folder, name):
    shutil.copy(Path(__file__).parent.parent / ".gitignore", folder)
    dummy.commit(folder)
    key = snapshot(project(folder)).key
    dummy.write(folder / name, "left")
    left = snapshot(project(folder))
    assert (left.key, left.dirty) == (key, False)


def test_a_state_folder_that_is_a_link_is_no_new_content_and_what_is_read_there_is_known(folder, tmp_path):
    from tasks.leftovers import being_read, named_on_disk
    from tasks.stages import DvcRepo

    shutil.copy(Path(__file__).parent.parent / ".gitignore", folder)
    dummy.commit(folder)
    (tmp_path / "drive" / "prefect").mkdir(parents=True)
    for name in (".longlora", "data", "models"):
        (folder / name).symlink_to(tmp_path / "drive")
    where = project(folder)
    state = snapshot(where)
    assert not state.dirty
    made = worktree(where, state)
    DvcRepo(made, environment={}).close()  # DVC took its files for ignored ones
    digest = "0" * 32
    dummy.write(made / "dvc.lock", f"md5: {digest}\n")
    assert (named_on_disk(where, set()), named_on_disk(where, {state.key})) == (set(), {digest})
    code = (
        f"import sys; from pathlib import Path; from tasks.locks import pin; pin(Path({str(made)!r})); print(); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as reader:
        assert reader.stdout.readline() == "\n"
        assert list(being_read(where)) == [made]
        reader.stdin.close()
