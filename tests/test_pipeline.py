"""The whole flow on the dummy project: real git, DVC, MLflow and Prefect, and real kills."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dummy
import psutil
import pytest
from test_supervise import alive, wait_until_gone

pytestmark = pytest.mark.slow
NAMES = ["fetch", "train", "score@base", "score@tuned", "gate", "report"]


def ask(url: str, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """Prefect's own interface, by http."""
    request = urllib.request.Request(
        f"{url}/{what}/filter", json.dumps(query).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def flow_runs(url: str, key: str) -> list[dict[str, Any]]:
    return ask(url, "flow_runs", {"flow_runs": {"name": {"like_": key}}, "sort": "START_TIME_ASC"})


def task_states(url: str, key: str) -> dict[str, str]:
    """State names by task of the key's last flow run; task runs reach the server by events, a moment later."""
    last = flow_runs(url, key)[-1]["id"]
    for _ in range(50):
        tasks = ask(url, "task_runs", {"flow_runs": {"id": {"any_": [last]}}})
        states = {task["name"]: task["state"]["name"] for task in tasks}
        if len(states) >= len(NAMES) and "Running" not in states.values():
            break
        time.sleep(0.2)
    return states


def artifacts(url: str, flow_run: str, kind: str) -> list[dict[str, Any]]:
    return ask(url, "artifacts", {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "type": {"any_": [kind]}}})


def key_of(folder: Path, *overrides: str) -> str:
    from tasks.workspace import project, snapshot

    return snapshot(project(folder), overrides=list(overrides)).key


def mlflow_runs(uri: str, key: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`longlora.key` = '{key}'"))


def test_so_many_stages_run_at_once_as_the_environment_says(monkeypatch):
    from flows.pipeline import jobs

    monkeypatch.delenv("LONGLORA_JOBS", raising=False)
    assert jobs() == 1
    monkeypatch.setenv("LONGLORA_JOBS", "3")
    assert jobs() == 3
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv("LONGLORA_JOBS", wrong)
        with pytest.raises(ValueError, match=f"^LONGLORA_JOBS={wrong}: must be a whole number from 1 on$"):
            jobs()


def test_how_many_is_asked_when_the_flow_begins(run_flow, own, monkeypatch):
    monkeypatch.setenv("LONGLORA_JOBS", "many")  # since it was imported
    with pytest.raises(ValueError, match="^LONGLORA_JOBS=many: must be"):
        run_flow()
    assert dummy.executions(own) == []


# --- without any server: what a first user gets


@pytest.fixture(scope="module")
def first(template, tmp_path_factory):
    """A project after `longlora run`, no server anywhere; and what the command said."""
    folder = tmp_path_factory.mktemp("first")
    dummy.git(folder, "clone", "--quiet", str(template), "dummy")
    return folder / "dummy", dummy.longlora(folder / "dummy", "run")


def test_a_run_ends_with_its_report_and_leaves_the_checkout_as_it_was(first):
    folder, done = first
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train | step 3" in done.stdout
    assert "Verdict: " in done.stdout
    assert "reports/page.html" in done.stdout
    assert dummy.git(folder, "status", "--porcelain") == ""
    assert not (folder / "models").exists()
    assert [line.split()[0] for line in dummy.executions(folder)] == [
        "fetch",
        "train",
        "score",
        "score",
        "gate",
        "report",
    ]


def test_a_run_is_recorded_in_git_in_dvc_and_in_mlflow(first):
    folder, _ = first
    key = key_of(folder)
    record = dummy.git(folder, "rev-parse", f"refs/longlora/runs/{key}")
    assert dummy.git(folder, "diff", "--name-only", "HEAD", record) == "dvc.lock"
    assert (folder / ".longlora" / "remote" / "files").is_dir()
    (run,) = mlflow_runs(f"sqlite:///{folder}/.longlora/mlflow.db", key)
    tags = run.data.tags
    assert (run.info.status, tags["longlora.record"], tags["longlora.verdict"]) == (
        "FINISHED",
        record,
        "metrics/verdict.json",
    )
    assert tags["longlora.remote"] == str(folder / ".longlora" / "remote")
    assert tags["mlflow.note.content"].startswith("# Dummy")
    address = (
        f"get-artifact?path=reports/score.png&run_uuid={run.info.run_id}"  # what the report's text shows, not the first
    )
    assert f"![score]({address})" in tags["mlflow.note.content"]
    assert run.data.metrics["passed"] == 1.0
    assert run.data.metrics["history/loss"] == pytest.approx(1 / 3)
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"models/base", "models/tuned", "reports"}


def test_a_second_run_says_that_nothing_changed_and_starts_no_server(first):
    folder, _ = first
    before, log = dummy.executions(folder), (folder / ".longlora" / "prefect.log").read_text()
    done = dummy.longlora(folder, "run")
    assert done.returncode == 0, done.stderr
    assert "every stage is unchanged" in done.stdout
    assert "Verdict: " in done.stdout
    assert dummy.executions(folder) == before
    assert (folder / ".longlora" / "prefect.log").read_text() == log


def test_promotion_and_a_champion_already_there(first, prefect_url):
    folder, _ = first
    assert (
        dummy.longlora(folder, "promote", env={"PREFECT_API_URL": prefect_url}).stdout
        == "dummy version 1 is champion: the verdict passed\n"
    )
    assert dummy.longlora(folder, "promote").stdout == "dummy version 1 is the champion already\n"
    assert "champion candidate" in " ".join(dummy.longlora(folder, "runs").stdout.split())
    assert "the verdict passed" in " ".join(dummy.longlora(folder, "history").stdout.split())


# --- the flow


def test_each_stage_is_a_task_its_output_in_the_log_and_the_run_goes_to_git(
    run_flow, own, environment, mlflow_uri, tmp_path, monkeypatch
):
    dummy.git(tmp_path, "init", "--quiet", "--bare", "shared.git")
    monkeypatch.setenv("LONGLORA_GIT_REMOTE", str(tmp_path / "shared.git"))
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run_flow()
    from mlflow import MlflowClient

    key, url = key_of(own), environment["PREFECT_API_URL"]
    assert task_states(url, key) == dict.fromkeys([*NAMES, "record"], "Completed")
    tags = mlflow_runs(mlflow_uri, key)[0].data.tags
    kept = f"refs/longlora/records/{tags['longlora.record']}"
    refs = dummy.git(tmp_path / "shared.git", "for-each-ref", "--format=%(refname)").splitlines()
    assert refs == [kept, f"refs/longlora/runs/{key}"]
    assert (tags["longlora.git"], tags["longlora.ref"]) == (str(tmp_path / "shared.git"), kept)
    last = flow_runs(url, key)[-1]["id"]
    for _ in range(50):
        messages = [log["message"] for log in ask(url, "logs", {"logs": {"flow_run_id": {"any_": [last]}}})]
        if "report starts" in messages:
            break
        time.sleep(0.2)
    assert [m.split("  ")[0] for m in messages if m.startswith("step")] == ["step 1/3", "step 2/3", "step 3/3"]
    (progress,) = artifacts(url, last, "progress")
    assert (progress["data"], progress["description"]) == (
        100.0,
        "train: step 3/3  loss 0.3333  1,003 tokens/s  0 s left  0.25 GB",
    )
    (summary,) = artifacts(url, last, "markdown")
    assert (summary["key"], summary["description"]) == (f"run-{key}", "Dummy")
    assert summary["data"].splitlines()[0] == "# Dummy"
    tasks = ask(url, "task_runs", {"task_runs": {"id": {"any_": [progress["task_run_id"]]}}})
    assert [task["name"] for task in tasks] == ["train"]
    client, run_id = MlflowClient(mlflow_uri), mlflow_runs(mlflow_uri, key)[0].info.run_id
    assert client.get_run(run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
    paces = [(point.step, point.value) for point in client.get_metric_history(run_id, "history/tokens_per_second")]
    assert sorted(paces) == [(1, 1001), (2, 1002), (3, 1003)]

    run_flow(overrides=["train.rank=5"])
    again = key_of(own, "train.rank=5")
    cached = {"fetch": "Cached", "score@base": "Cached"}
    assert task_states(url, again) == dict.fromkeys([*NAMES, "record"], "Completed") | cached
    (run,) = mlflow_runs(mlflow_uri, again)
    assert run.data.metrics["score/base"] == 0.25  # replayed, though its stage was cached; the value at the last length


def test_after_a_failure_only_what_does_not_depend_on_it_runs(
    run_flow, own, environment, mlflow_uri, tmp_path, monkeypatch, heard
):
    from tasks.stage_process import StageError

    dummy.write(tmp_path / "hook.py", "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    monkeypatch.setenv("LONGLORA_HOOK_COMMAND", f"{sys.executable} {tmp_path}/hook.py {tmp_path}/heard")
    with pytest.raises(StageError, match=r"^stage 'train': train.fail is set$"):
        run_flow(overrides=["train.fail=true"])
    assert [line.split()[0] for line in dummy.executions(own)] == [
        "fetch",
        "train",
        "score",
    ]  # a wrong parameter: no retry
    key = key_of(own, "train.fail=true")
    told = {"event": "failed", "message": "stage 'train': train.fail is set", "key": key, "model": "dummy"}
    assert json.loads((tmp_path / "heard").read_text()) == told
    assert heard == [told]
    states = task_states(environment["PREFECT_API_URL"], key)
    assert (states["train"], states["score@base"]) == ("Failed", "Completed")
    assert {states[name] for name in ("score@tuned", "gate", "report")} == {"NotReady"}
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["FAILED"]
    assert dummy.git(own, "for-each-ref", "refs/longlora") == ""


def test_what_prefect_keeps_of_a_run_that_failed_is_no_pickle(run_flow, own):
    from flows.promote import promote

    for flow in (run_flow, promote):
        kept = flow("nowhere", return_state=True).data.metadata
        assert kept.serializer.type == "json"
        assert "nowhere" in Path(kept.storage_key).read_text()


def test_an_accident_is_tried_again_as_meta_says(run_flow, own):
    run_flow(overrides=["train.flaky=2"])
    assert dummy.executions(own).count("train base") == 3


def test_a_slip_in_meta_is_said_before_anything_runs(run_flow, own):
    path = own / "dvc.yaml"
    path.write_text(path.read_text().replace("{retries: 2, retry_delay_seconds", "{retires: 2, retry_delay_seconds"))
    dummy.commit(own)
    with pytest.raises(ValueError, match="^dvc.yaml: stages: train: meta: unknown key 'retires'; there are: retries, "):
        run_flow()
    assert dummy.executions(own) == []


@pytest.mark.parametrize("name", ["models/tuned", "rivals/old"])
def test_of_a_model_that_was_changed_when_it_was_measured_there_is_no_record_and_the_same_run_measures_again(
    run_flow, own, name
):
    from dvc.repo import Repo

    label = Path(name).name
    swap = f"""
    if model.name == "{label}" and not (notes / "swapped").exists():
        (notes / "swapped").touch()
        (model / "weights").unlink()
        (model / "weights").write_text("another, and longer")
    size = """
    dummy.write(own / "dummy/stage.py", dummy.STAGE.lstrip().replace("\n    size = ", swap))
    dummy.write(own / "rivals" / "old" / "weights", "bbbbbbbb")
    with Repo(str(own)) as repo:
        repo.add(str(own / "rivals" / "old"))
    with pytest.raises(
        ValueError, match=rf"^{name} was changed while the run was at work: stage 'score\S*@{label}' read"
    ):
        run_flow(overrides=["rivals.models=[old]"])
    assert dummy.git(own, "for-each-ref", "refs/longlora") == ""
    key = run_flow(overrides=["rivals.models=[old]"])
    scored = json.loads((own / f".longlora/worktrees/{key}/metrics/score/{label}.json").read_text())
    assert scored["score"][label] == {"4": 2.0, "2": 4.0}  # of eight letters
    assert dummy.git(own, "for-each-ref", "refs/longlora") != ""


def test_a_stage_over_its_time_is_ended_with_all_its_processes(run_flow, own):
    text = (own / "dvc.yaml").read_text()
    (own / "dvc.yaml").write_text(text.replace("{retries: 2, retry_delay_seconds: 0,", "{timeout_seconds: 3,"))
    dummy.commit(own)
    started = time.monotonic()
    with pytest.raises(Exception, match="timed out|timeout"):
        run_flow(overrides=["train.seconds=60"])
    assert time.monotonic() - started < 55
    assert not alive(own / ".longlora" / "worktrees" / key_of(own, "train.seconds=60"))


def test_a_scheduled_run_refuses_a_dirty_checkout_and_any_other_says_so(run_flow, own, mlflow_uri, heard):
    (own / "own").write_text("changed")
    with pytest.raises(ValueError, match="uncommitted changes"):
        run_flow(scheduled=True)
    (told,) = heard
    assert (told["event"], told["key"]) == ("failed", None)
    assert "has uncommitted changes, and a scheduled run must be reproducible" in told["message"]
    run_flow()
    assert heard == [told]
    assert mlflow_runs(mlflow_uri, key_of(own))[0].data.tags["longlora.dirty"] == "true"


def test_a_run_that_is_being_promoted_is_not_taken_for_a_dead_one_and_of_a_dead_one_is_told(
    run_flow, own, monkeypatch, heard
):
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling, Running

    from flows.pipeline import tell_of_the_dead
    from tasks.locks import is_held
    from tasks.workspace import home, project

    key, where, states = key_of(own), project(own), []

    def promote(
        run: str,
    ) -> str:  # meanwhile another run of the project begins, and one that was killed is still said to run
        assert not is_held(where, key)
        with get_client(sync_client=True) as client:
            alive = flow_run.get_id()
            dead, cancelled = (
                client.create_flow_run(run_flow, name=f"params-{key}", tags=[home(where)], state=state).id
                for state in (Running(), Cancelling())
            )
            for _ in range(2):  # it is told once
                tell_of_the_dead(where)
            states.extend(client.read_flow_run(each).state.name for each in (alive, dead, cancelled))
        return "promoted"

    monkeypatch.setattr("flows.promote.promote", promote)
    run_flow(promote=True)
    assert states == ["Running", "Crashed", "Cancelled"]
    assert heard == [{"event": "failed", "message": "its process ended without a word", "key": key, "model": None}]


def test_a_stages_progress_is_one_artifact_made_at_the_first_step_and_then_changed_but_not_at_each(monkeypatch):
    from flows import progress

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *args, **kw: asked.append((*args, kw)) or "id")
    monkeypatch.setattr(progress, "update_progress_artifact", lambda *args, **kw: asked.append((*args, kw)))
    shown = progress.Progress("fit", "history")
    lines = [f"step {n}/4  loss {n}.5000  1,200 tokens/s  {4 - n} s left  1.25 GB" for n in (1, 2, 3, 4)]
    shown.show()
    for line in ["loading", lines[0], "a warning"]:
        shown.hear(line)
    for _ in range(5):
        shown.show()
    shown.hear(lines[1])
    shown.show()  # too soon
    monkeypatch.setattr(shown, "_due", 0.0)
    shown._look.result()
    shown.hear(lines[2])
    shown.show()
    shown.hear(lines[3])
    shown.end(print)
    texts = [{"description": f"fit: {line}"} for line in lines]
    assert asked == [(25.0, texts[0]), ("id", 75.0, texts[2]), ("id", 100.0, texts[3])]
    assert shown.points[:2] == [("history/tokens_per_second", 1200.0, 1), ("history/memory_gb", 1.25, 1)]


def test_a_stage_does_not_fail_because_its_progress_can_not_be_shown(monkeypatch):
    from flows import progress

    def refused(*args, **kw):
        raise ConnectionError("gone")

    monkeypatch.setattr(progress, "create_progress_artifact", refused)
    shown, said = progress.Progress("fit", "history"), []
    shown.hear("step 1/4  loss 2.5000  1,200 tokens/s  3 s left  1.25 GB")
    shown.end(said.append)
    assert said == ["its progress is not on Prefect's page: gone"]


# --- kills


def start(folder: Path, environment: dict[str, str], *overrides: str) -> "subprocess.Popen[str]":
    settings = [word for override in overrides for word in ("--set", override)]
    command = [str(Path(sys.executable).with_name("longlora")), "run", *settings]
    env = {**dummy.clean_environment(), **environment}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without saying '{text}': {process.stderr.read() if process.stderr else ''}")


def test_sigkill_leaves_no_process_and_the_next_run_ends_with_the_same_hashes(own, environment, mlflow_uri, tmp_path):
    slow = "train.seconds=0.5"
    process = start(own, environment, slow, "train.steps=6")
    read_until(process, "train | step 2")
    work = own / ".longlora" / "worktrees" / key_of(own, slow, "train.steps=6")
    assert alive(work)
    process.kill()
    process.wait()
    wait_until_gone(work, 15)

    again = start(own, environment, slow, "train.steps=6")
    out, error = again.communicate(timeout=300)
    assert (again.returncode, error) == (0, ""), out
    assert dummy.executions(own).count("fetch base") == 1
    (run,) = mlflow_runs(mlflow_uri, work.name)
    assert run.info.status == "FINISHED"
    assert [r["state"]["name"] for r in flow_runs(environment["PREFECT_API_URL"], work.name)] == [
        "Crashed",
        "Completed",
    ]

    dummy.git(tmp_path, "clone", "--quiet", str(own), "unharmed")
    unharmed = start(tmp_path / "unharmed", {**environment, "MLFLOW_TRACKING_URI": mlflow_uri}, slow, "train.steps=6")
    unharmed.communicate(timeout=300)
    ref = f"refs/longlora/runs/{work.name}"
    assert dummy.git(tmp_path / "unharmed", "rev-parse", ref) == dummy.git(own, "rev-parse", ref)


def test_a_training_that_can_not_fit_is_refused_before_any_stage_in_whatever_way_it_was_started(
    run_flow, own, monkeypatch, heard
):
    def refuse(run_dir, *, anyway):
        if not anyway:
            raise ValueError("the run does not fit")

    monkeypatch.setattr("flows.pipeline.must_fit", refuse)
    with pytest.raises(ValueError, match="does not fit"):
        run_flow(scheduled=True)
    assert dummy.executions(own) == []
    assert heard == [{"event": "failed", "message": "the run does not fit", "key": key_of(own), "model": "dummy"}]
    run_flow(anyway=True)
    assert dummy.executions(own)[0] == "fetch base"


def test_a_run_that_is_open_is_not_opened_again_and_is_locked_until_it_is_recorded(run_flow, own, monkeypatch):
    from flows.pipeline import Opened, pipeline_of
    from flows.run_dir import open_run_dir
    from tasks import locks, storage
    from tasks.workspace import project, snapshot

    where, note, held = project(own), storage.note, []
    state, lock = snapshot(where), ExitStack()
    lock.enter_context(locks.hold(where, state.key))
    run_dir = open_run_dir(where, state)
    monkeypatch.setattr("flows.pipeline.open_run_dir", None)
    monkeypatch.setattr(storage, "note", lambda *said: (held.append(locks.is_held(where, state.key)), note(*said)))
    pipeline_of(state, opened=Opened(run_dir, lock))
    assert len(dummy.executions(own)) == len(NAMES)
    assert (held, locks.is_held(where, state.key)) == ([True], False)


def test_parameters_that_are_wrong_for_a_late_stage_are_refused_before_any_stage_and_any_look_at_memory(
    run_flow, own, heard, monkeypatch
):
    dummy.with_a_stage_of_the_library(own)
    monkeypatch.setattr("flows.pipeline.must_fit", None)  # it reads params.yaml as if it were right
    with pytest.raises(ValueError, match=r"^params: key 'gate\.rules' is missing"):
        run_flow()
    assert dummy.executions(own) == []
    assert [each["message"][:35] for each in heard] == ["params: key 'gate.rules' is missing"]


def test_a_run_that_finds_no_mlflow_tells_of_it(run_flow, own, monkeypatch, heard):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI") as caught:
        run_flow()
    assert [(each["event"], each["message"]) for each in heard] == [("failed", str(caught.value))]
    assert dummy.executions(own) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_its_stage_and_says_killed(own, environment, mlflow_uri, number, status):
    process = start(own, environment, "train.seconds=60")
    read_until(process, "train | train starts")
    work = own / ".longlora" / "worktrees" / key_of(own, "train.seconds=60")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    assert not alive(work)
    (run,) = mlflow_runs(mlflow_uri, work.name)
    assert run.info.status == "KILLED"


SAVING = """
import atexit, signal, sys
def save():
    time.sleep(2)
    (notes / "saved").touch()
def end(*_):
    atexit.register(save)
    sys.exit(143)
signal.signal(15, end)
"""


def cancel(url: str, key: str) -> None:
    """As Prefect's page does."""
    (run,) = flow_runs(url, key)
    state = json.dumps({"state": {"type": "CANCELLING", "name": "Cancelling"}})
    address = f"{url}/flow_runs/{run['id']}/set_state"
    urllib.request.urlopen(
        urllib.request.Request(address, state.encode(), {"content-type": "application/json"})
    ).close()


def test_a_cancel_from_prefects_page_ends_the_run_after_the_stage_has_saved(own, environment, mlflow_uri):
    dummy.write(own / "dummy" / "stage.py", SAVING + (own / "dummy" / "stage.py").read_text())
    process = start(own, environment, "train.seconds=60")
    read_until(process, "train | train starts")
    key, url = key_of(own, "train.seconds=60"), environment["PREFECT_API_URL"]
    cancel(url, key)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in error) == (143, False), error
    assert error.endswith("error: cancelled in Prefect; the same command goes on where it stopped\n")
    assert (own / ".longlora" / "checkpoints" / "saved").exists()
    assert not alive(own / ".longlora" / "worktrees" / key)
    assert [run["state"]["name"] for run in flow_runs(url, key)] == ["Cancelled"]
    assert [run.info.status for run in mlflow_runs(mlflow_uri, key)] == ["KILLED"]


@pytest.mark.parametrize("wait", [0, 1])
def test_a_run_that_is_interrupted_while_its_own_server_starts_ends_it_too(own, mlflow_uri, wait):
    process = start(own, {"MLFLOW_TRACKING_URI": mlflow_uri})
    read_until(process, "report  ")  # the last stage that is shown
    time.sleep(wait)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("prefect" in child.cmdline() for child in children)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert dummy.executions(own) == []


def test_the_same_run_started_twice_is_computed_once(own, environment):
    one = start(own, environment, "train.seconds=0.5")
    read_until(one, "fetch | fetch starts")
    two = start(own, environment, "train.seconds=0.5")
    two_said, error = two.communicate(timeout=300)
    one.communicate(timeout=300)
    assert (one.returncode, two.returncode, error) == (0, 0, "")
    assert two_said.startswith("waiting: another process works on")
    assert "every stage is unchanged" in two_said
    assert dummy.executions(own).count("train base") == 1
    assert os.path.exists(own)
