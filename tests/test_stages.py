"""DVC's graph and freshness as the flow sees them, on real DVC."""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import dummy
import pytest
from dvc.dvcfile import ProjectFile, load_file
from dvc.exceptions import DvcException
from dvc.repo import Repo

from flows.run_dir import RunDir, open_run_dir
from tasks import stage_process, supervise
from tasks.outputs import artifacts_at, read
from tasks.single import write_lock
from tasks.stage_process import InterruptedStageError, ParameterError, StageError, StageRunner, stage_environment
from tasks.storage import record
from tasks.workspace import project, snapshot

NAMES = ["fetch", "train", "score@base", "score@tuned", "gate", "report"]


def run_dir_of(folder: Path, *overrides: str) -> RunDir:
    where = project(folder)
    return open_run_dir(where, snapshot(where, overrides=list(overrides)))


def run_all(run_dir: RunDir, said: list[str] | None = None) -> None:
    for stage in run_dir.dvc.plan():
        if stage.status == "stale" and run_dir.dvc.settle(stage.name) == "stale":
            hear = said.append if said is not None else print
            run_dir.dvc.run_stage(stage.name, on_line=hear, on_tick=lambda: None)
    run_dir.dvc.close()


def statuses(run_dir: RunDir) -> dict[str, str]:
    return {stage.name: stage.status for stage in run_dir.dvc.plan()}


@pytest.fixture(scope="module")
def ran(template, tmp_path_factory) -> Path:
    """A project that was run once. Tests add to it; none changes what is there."""
    folder = tmp_path_factory.mktemp("ran")
    dummy.git(folder, "clone", "--quiet", str(template), "dummy")
    run_all(run_dir_of(folder / "dummy"))
    return folder / "dummy"


def test_the_plan_is_dvcs_graph_upstream_first(folder):
    plan = run_dir_of(folder).dvc.plan()
    assert [stage.name for stage in plan] == NAMES
    assert {stage.name: set(stage.upstream) for stage in plan} == {
        "fetch": set(),
        "train": {"fetch"},
        "score@base": {"fetch"},
        "score@tuned": {"train"},
        "gate": {"score@base", "score@tuned"},
        "report": {"gate"},
    }
    assert (plan[0].desc, plan[0].meta["tags"], plan[0].status) == ("Bring the base.", ["network"], "stale")


def test_what_was_run_is_unchanged_and_was_run_once(ran):
    run_dir = run_dir_of(ran)
    assert set(statuses(run_dir).values()) == {"unchanged"}
    lines = dummy.executions(ran)
    assert [line for line in lines if line.startswith("fetch")] == ["fetch base"]


def test_another_run_restores_what_it_shares_and_computes_the_rest(ran):
    run_dir = run_dir_of(ran, "train.rank=5")
    assert {stage.name: stage.status for stage in run_dir.stages} == {
        "fetch": "restored",
        "train": "stale",
        "score@base": "restored",
        "score@tuned": "stale",
        "gate": "stale",
        "report": "stale",
    }
    before = len(dummy.executions(ran))
    run_all(run_dir)
    assert dummy.executions(ran)[before:] == ["train base", "score tuned", "gate base", "report verdict"]
    assert set(statuses(run_dir).values()) == {"unchanged"}


def test_a_stage_whose_inputs_came_out_as_before_is_restored_downstream_of_a_rerun(ran):
    # rank 8 for 4 steps makes the same weights as rank 8 for 3, so what follows train is known
    run_dir, before = run_dir_of(ran, "train.steps=4"), len(dummy.executions(ran))
    run_all(run_dir)
    assert dummy.executions(ran)[before:] == ["train base"]


def test_the_flow_and_plain_dvc_repro_make_the_same_lock(ran, folder):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=folder, env=env, check=True)
    assert (folder / "dvc.lock").read_text() == (run_dir_of(ran).folder / "dvc.lock").read_text()


LOCKS = {
    "whole": lambda text: text,
    "with another hash": lambda text: text.replace("md5: ", "md5: 0"),
    "without the stage": lambda text: re.sub(r"(?m)^  train:\n(    .*\n)+", "", text),
    "below a note": lambda text: f"# a note\n{text}",
    "of no stage": lambda text: "schema: '2.0'\nstages: {}\n",
    "with a note in the stage": lambda text: text.replace("  train:\n", "  train: # a note\n\n"),
    "with datasets": lambda text: text.replace("stages:", "datasets:\n- name: a\n  url: b\nstages:"),
    "that is not there": lambda text: None,
}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_stage_comes_into_dvc_lock_as_dvc_would_put_it_there_but_in_one_step(ran, tmp_path, monkeypatch, lock):
    folder = run_dir_of(ran).folder
    file, whole, kept = folder / "dvc.lock", (folder / "dvc.lock").read_text(), tmp_path / "kept"
    repo = Repo(str(folder))
    stages = load_file(repo, str(folder / "dvc.yaml")).stages
    both = [stages["train"], stages["gate"]]
    text, theirs, asked = LOCKS[lock](whole), ProjectFile.dump_stages, []
    try:
        written = {}
        for who, write in {
            "dvc": lambda: theirs(both[0].dvcfile, both, update_pipeline=False),
            "us": partial(write_lock, both),
        }.items():
            file.unlink(missing_ok=True)
            if text is not None:
                file.write_text(text)
                kept.unlink(missing_ok=True)
                kept.hardlink_to(file)
            with monkeypatch.context() as patch:
                patch.setattr(
                    ProjectFile, "dump_stages", lambda *given, **named: asked.append(1) or theirs(*given, **named)
                )
                write()
            written[who] = file.read_text()
        assert written["us"] == written["dvc"]
        by_dvc = lock in ("of no stage", "with a note in the stage", "with datasets")
        assert len(asked) == by_dvc
        if not by_dvc and text is not None:
            assert kept.read_text() == text
    finally:
        file.unlink()
        file.write_text(whole)


def test_dvc_repro_finds_nothing_to_do_after_the_flow(ran):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=run_dir_of(ran).folder, capture_output=True, text=True
    )
    assert done.stdout.count("didn't change, skipping") == len(NAMES)
    assert "Running" not in done.stdout


def test_files_that_are_gone_or_spoilt_come_back_from_the_cache(ran):
    run_dir, before = run_dir_of(ran), dummy.executions(ran)
    shutil.rmtree(run_dir.folder / "models" / "tuned")
    weights = run_dir.folder / "models" / "base" / "weights"
    weights.unlink()
    weights.write_text("half writ")
    assert statuses(run_dir) == dict.fromkeys(NAMES, "unchanged") | {"fetch": "restored", "train": "restored"}
    assert weights.read_text() == "b"
    assert dummy.executions(ran) == before


@pytest.mark.parametrize("fetch", ["outs: [{models/base: {persist: true}}]", "deps: []\n    outs: [models/base]"])
def test_the_plan_runs_no_command_though_the_run_cache_has_no_place_for_a_stage(folder, fetch):
    text = (folder / "dvc.yaml").read_text()
    dummy.write(folder / "dvc.yaml", text.replace('deps: [dummy/stage.py]\n    outs: ["${models}/base"]', fetch, 1))
    dummy.commit(folder)
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    shutil.rmtree(run_dir.folder / "models")
    assert statuses(run_dir)["fetch"] == "restored"
    assert (run_dir.folder / "models" / "base" / "weights").read_text() == "b"
    # a command that we ran would not be told where checkpoints are
    assert not (run_dir.folder / "executions").exists()


@pytest.mark.parametrize("known_by", ["dvc.lock", "the run cache"])
def test_what_goes_from_the_cache_while_it_is_put_in_place_is_not_taken_for_whole(folder, monkeypatch, known_by):
    from dvc_data.hashfile import checkout

    code = (folder / "dummy" / "stage.py").read_text()
    two = code.replace('.write_text("b")', '.write_text("b"); (base / "more").write_text("more")')
    dummy.write(folder / "dummy" / "stage.py", two)
    dummy.commit(folder)
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    shutil.rmtree(run_dir.folder / "models")
    if known_by == "the run cache":
        (run_dir.folder / "dvc.lock").unlink()
    objects = [path for path in (folder / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]
    (lost,) = (path for path in objects if path.read_text() == "more")
    before = checkout._checkout

    def after_somebody_deleted_it(*given, **named):
        lost.unlink(missing_ok=True)
        return before(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(checkout, "_checkout", after_somebody_deleted_it)
        with pytest.raises(DvcException, match=r"models/base/more went from the cache meanwhile"):
            run_dir.dvc.plan()
    assert statuses(run_dir)["fetch"] == "stale"


def test_a_dependency_that_is_gone_is_the_stages_error(folder, tmp_path):
    beside = tmp_path / "beside"
    beside.write_text("1")
    text = (folder / "dvc.yaml").read_text().replace("deps: [dummy/stage.py]", f"deps: [dummy/stage.py, {beside}]", 1)
    dummy.write(folder / "dvc.yaml", text)
    dummy.commit(folder)
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    shutil.rmtree(run_dir.folder / "models")
    beside.unlink()
    run_dir = run_dir_of(folder)
    assert {stage.name: stage.status for stage in run_dir.stages}["fetch"] == "stale"
    with pytest.raises(StageError, match=r"^stage 'fetch': .*No such file or directory: .*beside"):
        run_all(run_dir)
    run_dir.dvc.close()


def test_another_clone_pulls_what_the_record_says(ran, folder):
    run_dir = run_dir_of(ran)
    assert run_dir.dvc.push() == str(ran / ".longlora" / "remote")
    record(run_dir.where, run_dir.snapshot, run_dir.folder)
    shutil.copytree(ran / ".longlora" / "remote", folder / ".longlora" / "remote")
    dummy.git(folder, "fetch", "--quiet", str(ran), "+refs/longlora/*:refs/longlora/*")
    assert {stage.status for stage in run_dir_of(folder).stages} == {"restored"}
    assert dummy.executions(folder) == []


def test_data_that_is_nowhere_any_more_is_computed_again(ran, folder):
    run_dir = run_dir_of(ran)
    commit = record(run_dir.where, run_dir.snapshot, run_dir.folder)
    dummy.git(folder, "fetch", "--quiet", str(ran), f"{commit}:refs/longlora/runs/{run_dir.snapshot.key}")
    assert set(statuses(run_dir_of(folder)).values()) == {"stale"}


def test_a_stages_last_error_is_the_error(folder):
    run_dir = run_dir_of(folder, "train.fail=true")
    with pytest.raises(ParameterError, match=r"^stage 'train': train.fail is set$"):
        run_all(run_dir)
    run_dir.dvc.close()
    assert statuses(run_dir) == dict.fromkeys(NAMES, "stale") | {"fetch": "unchanged"}


def test_an_accident_is_no_parameter_error(folder):
    run_dir = run_dir_of(folder, "train.flaky=1")
    with pytest.raises(StageError, match=r"^stage 'train': connection lost$") as caught:
        run_all(run_dir)
    assert not isinstance(caught.value, ParameterError)
    run_all(run_dir)  # the second time it works
    assert dummy.executions(folder).count("train base") == 2


def test_a_told_end_ends_the_stage_and_starts_no_other_whatever_becomes_of_the_exception(folder, monkeypatch):
    monkeypatch.setattr(supervise, "interrupted", False)
    run_dir = run_dir_of(folder, "train.seconds=60")

    def hear(line: str) -> None:
        if line == "train starts":
            supervise.interrupt()  # as a signal handler does, its exception lost

    run_dir.dvc.run_stage("fetch", on_line=hear, on_tick=lambda: None)
    for _ in range(2):
        with pytest.raises(InterruptedStageError, match=r"^stage 'train': interrupted$"):
            run_dir.dvc.run_stage("train", on_line=hear, on_tick=lambda: None)
    assert dummy.executions(folder) == ["fetch base", "train base"]
    run_dir.dvc.close()


def test_no_stage_is_passed_over_where_another_begins_at_the_same_moment(tmp_path, monkeypatch):
    ran: list[str] = []

    class Told:
        def __init__(self, *_, **__) -> None:
            time.sleep(0.001)  # as the start of a process, it lets the other threads go on

        def run(self, name: str, **_) -> int:
            ran.append(name)
            return 0

        def close(self) -> None:
            pass

    monkeypatch.setattr(stage_process, "Child", Told)
    runner = StageRunner(tmp_path, environment={}, afresh=False)
    names = [f"score@{n}" for n in range(400)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: runner.run(name, queues=False, on_line=print, on_tick=lambda: None), names))
    assert len(ran) == len(names)


def test_without_a_stage_there_is_nothing_to_run(folder):
    dummy.write(folder / "dvc.yaml", "")
    dummy.commit(folder)
    with pytest.raises(ValueError, match=r"^dvc\.yaml has no stages: there is nothing to run$"):
        run_dir_of(folder)


def test_a_file_that_two_stages_would_write_is_one_line(folder):
    (folder / "rivals").mkdir(exist_ok=True)
    with pytest.raises(
        ValueError, match=r"score/base\.json is written by two stages, score@base and score_rivals@base: leave"
    ):
        run_dir_of(folder, "rivals.models=[base]")


def test_a_name_in_a_matrix_is_no_shell_command(folder):
    name = "x;touch PWNED;/../mine"
    dummy.write(folder / "rivals" / "mine.dvc", "outs: [{md5: d8e8fca2dc0f896fd7cb4cb0031ba249.dir, path: mine}]\n")
    dummy.commit(folder)
    with pytest.raises(ValueError, match=r"^stage 'score_rivals@x;touch PWNED;/\.\./mine': the values of its matrix"):
        run_dir_of(folder, f"rivals.models=['{name}']")


def test_torchrun_waits_for_its_workers_as_long_as_we_wait_for_it(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setenv("LONGLORA_GRACE", "240")
    assert stage_environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "240"
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    assert stage_environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"


def test_a_stage_gets_its_own_code_and_none_of_our_keys(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    with (folder / "dummy" / "stage.py").open("a") as file:
        file.write(
            "print(sorted(k for k in os.environ if k.startswith(('MLFLOW', 'PREFECT'))), os.environ['SHELL'], __file__)\n"
        )
    run_dir, said = run_dir_of(folder), []
    run_all(run_dir, said)
    assert said[1] == f"[] /bin/sh {run_dir.folder}/dummy/stage.py"


def test_checkpoints_lie_where_the_user_says_but_not_those_of_a_rerun(folder, tmp_path, monkeypatch):
    from flows.cli.reproduce import compute_again

    dummy.write(folder / "dvc.yaml", "stages:\n  fetch:\n    cmd: python -m dummy.stage fetch base\n    outs: [base]\n")
    dummy.commit(folder)
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", "../shared")
    monkeypatch.chdir(folder)
    run_dir = run_dir_of(folder)
    run_all(run_dir)
    assert (tmp_path / "shared" / "executions").read_text() == "fetch base\n"
    record(run_dir.where, run_dir.snapshot, run_dir.folder)
    compute_again(run_dir.where, run_dir.snapshot.key, "again")
    assert (tmp_path / "shared" / "executions").read_text() == "fetch base\n"
    assert dummy.executions(folder) == []


def test_outputs_say_kind_hash_size_and_plot_axes(ran):
    run_dir = run_dir_of(ran)
    outs = {out.path: out for stage in run_dir.stages for out in run_dir.dvc.outs(stage)}
    assert {path: out.kind for path, out in outs.items()} == {
        "models/base": "out",
        "models/tuned": "out",
        "metrics/history.csv": "plot",
        "metrics/score/base.json": "metric",
        "metrics/score/tuned.json": "metric",
        "metrics/verdict.json": "metric",
        "reports": "out",
    }
    assert outs["metrics/history.csv"].options["x"] == "step"
    assert (outs["models/tuned"].size, str(outs["models/tuned"].md5)[-4:]) == (8, ".dir")
    assert run_dir.verdict() == "metrics/verdict.json"


def test_artifacts_and_files_can_be_read_at_a_commit(ran):
    run_dir = run_dir_of(ran)
    commit = record(run_dir.where, run_dir.snapshot, run_dir.folder)
    model, report = artifacts_at(ran, commit)
    assert (model.name, model.path, model.type, model.labels) == ("dummy", "models/tuned", "model", ["toy"])
    assert (report.type, report.meta) == ("report", {})
    assert read(ran, commit, "models/tuned/weights") == "b" * 8
    with pytest.raises(ValueError, match="neither in the cache nor"):
        read(ran, commit, "models/tuned/nothing")


def test_a_worktree_uses_the_users_remote_and_keys(folder):
    (folder / ".dvc" / "config.local").write_text(
        "[core]\n    remote = s3\n['remote \"s3\"']\n    url = s3://b/c\n    secret_access_key = k\n"
    )
    run_dir = run_dir_of(folder)
    config = (run_dir.folder / ".dvc" / "config.local").read_text()
    assert "url = s3://b/c" in config
    assert "secret_access_key = k" in config
    assert "dir = ../../../../.dvc/cache" in config  # the checkout's, seen from that file
    assert "url = ../../../remote" in config
    assert (run_dir.folder / ".dvc" / "config.local").stat().st_mode & 0o77 == 0
    assert dummy.git(run_dir.folder, "status", "--porcelain") == ""


@pytest.mark.parametrize("change", [shutil.move, partial(shutil.copytree, symlinks=True)])
def test_a_project_that_was_moved_or_copied_goes_on_in_worktrees_of_its_own(folder, tmp_path, change):
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    change(folder, tmp_path / "new")
    if folder.exists():
        before = (run_dir.folder / ".git").read_text(), dummy.git(run_dir.folder, "status")
    there = run_dir_of(tmp_path / "new")
    assert (there.snapshot.key, there.stages[0].status) == (run_dir.snapshot.key, "restored")
    assert dummy.git(there.folder, "rev-parse", "--path-format=absolute", "--git-common-dir") == str(
        tmp_path / "new/.git"
    )
    if folder.exists():
        assert before == ((run_dir.folder / ".git").read_text(), dummy.git(run_dir.folder, "status"))


def test_settings_that_a_kill_cut_off_or_the_user_took_away_are_written_anew(folder):
    run_dir = run_dir_of(folder)
    ours = run_dir.folder / ".dvc" / "config.local"
    before = ours.read_text()
    for text in (before[:-30], "[co", f"{before}['remote \"old\"']\n    url = /nowhere\n"):
        ours.write_text(text)
        assert run_dir_of(folder).folder == run_dir.folder
        assert ours.read_text() == before


def test_a_project_may_have_a_split_index_which_dvc_does_not_read(folder):
    dummy.git(folder, "config", "core.splitIndex", "true")
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    assert statuses(run_dir)["fetch"] == "unchanged"


def test_a_user_may_have_dvc_lock_by_hard_links_and_a_run_is_locked_by_our_own(folder):
    config = folder / ".dvc" / "config"
    dummy.write(config, config.read_text().replace("[core]", "[core]\n    hardlink_lock = true"))
    run_dir = run_dir_of(folder)
    run_all(run_dir)
    assert set(statuses(run_dir).values()) == {"unchanged"}


def test_a_project_may_be_a_submodule(template, tmp_path):
    dummy.git(tmp_path, "init", "--quiet", "above")
    dummy.git(
        tmp_path / "above", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(template), "dummy"
    )
    run_dir = run_dir_of(tmp_path / "above" / "dummy")
    run_all(run_dir)
    assert set(statuses(run_dir).values()) == {"unchanged"}


def test_a_project_may_lie_below_a_name_that_is_not_ascii(tmp_path):
    from tasks.locks import hold

    where = project(dummy.make(tmp_path / "Jörg's own" / "проект"))
    state = snapshot(where)
    with hold(where, state.key):
        run_dir = open_run_dir(where, state)
        run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
        run_dir.dvc.close()
        assert run_dir.dvc.push() == str(where.root / ".longlora" / "remote")
    assert list((where.root / ".longlora" / "remote").rglob("*.dir"))
    assert list((where.root / ".dvc" / "cache").rglob("*.dir"))
    assert not (run_dir.folder / ".dvc" / "cache").exists()


def test_what_a_full_disk_cut_off_in_the_run_cache_is_made_anew(folder):
    run_dir = run_dir_of(folder)
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    (entry,) = (folder / ".dvc" / "cache" / "runs").glob("??/*/*")
    entry.chmod(0o644)
    entry.write_text("")
    (run_dir.folder / "dvc.lock").unlink()
    for _ in range(2):  # the first look removes the file, and leaves its folder empty
        assert statuses(run_dir)["fetch"] == "stale"
    run_dir.dvc.run_stage("fetch", on_line=print, on_tick=lambda: None)
    run_dir.dvc.close()
    assert statuses(run_dir)["fetch"] == "unchanged"
    assert entry.read_text() != ""
