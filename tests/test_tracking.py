"""MLflow filled from files, on a real store."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import dummy
import pytest
from PIL import Image

from tasks.servers import use_environment
from tasks.stages import Out
from tasks.tags import RECORD
from tasks.workspace import project, snapshot, worktree


@pytest.fixture
def opened(folder, mlflow_uri, monkeypatch, tmp_path):
    """A function that opens the folder's run, as each attempt of a flow does."""
    from tasks import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.name")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "Tester")
    where = project(folder)
    state = snapshot(where, recipe="big", overrides=["train.steps=4"])
    place = worktree(where, state)

    def open_run() -> "tracking.Tracker":
        return tracking.Tracker(tracking.connect(), where, state, experiment=tmp_path.name, folder=place)

    return open_run


def points(tracker, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, key))


def write_history(folder: Path, text: str) -> list[Out]:
    dummy.write(folder / "metrics" / "history.csv", text)
    return [Out("metrics/history.csv", "plot", {"x": "step", "y": "loss"})]


HALF_MADE = """
import abc, collections.abc
from flows import mlflow_writer  # what it imports by itself is imported before there are threads
kinds = (list, tuple, str, bytes, set)
for of in (collections.abc.Sequence, collections.abc.Set, collections.abc.Collection):
    [issubclass(kind, of) for kind in kinds]

class Forget(collections.abc.Hashable): ...

whole = abc._abc_init

def ask(made):  # where another thread may have its turn
    Forget.register(type("", (), {}))
    taken = [kind for kind in kinds if issubclass(kind, collections.abc.Mapping)]
    assert not taken, f"while {made} is made, {taken} is a Mapping, and stays it"
    whole(made)

abc._abc_init = ask
from tasks import tracking
"""


def test_no_class_of_what_is_imported_beside_threads_makes_them_take_a_list_for_a_mapping():
    done = subprocess.run([sys.executable, "-c", HALF_MADE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_machine_is_watched_until_the_run_ends_and_a_resumed_run_goes_on_counting(opened, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    seen: list[list[int]] = []
    for _ in range(2):
        tracker = opened()
        tracker.watch()
        before, deadline = len(seen[-1]) if seen else 0, time.monotonic() + 20
        while len(points(tracker, "system/cpu_utilization_percentage")) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        tracker.finish("FAILED")
        seen.append([step for step, _ in points(tracker, "system/cpu_utilization_percentage")])
    assert len(seen[0]) >= 2 and len(seen[1]) >= len(seen[0]) + 2
    assert seen[1] == list(range(len(seen[1])))  # no step twice
    assert "system/system_memory_usage_megabytes" in tracker.client.get_run(tracker.run_id).data.metrics
    assert "monitoring" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:///../m.db", "sqlite:///{}/../m.db"),
        ("sqlite:////lab/m.db", "sqlite:////lab/m.db"),
        ("http://lab:5000", "http://lab:5000"),
    ],
)
def test_a_database_named_from_the_current_folder_is_the_same_from_any(folder, monkeypatch, given, used):
    monkeypatch.chdir(folder)
    with mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": given}):
        use_environment(project(folder))
        assert os.environ["MLFLOW_TRACKING_URI"] == used.format(folder)


@pytest.mark.parametrize("half", ["violet", "violet:", ":violet"])
def test_half_of_what_lets_in_is_one_line_that_does_not_hold_it(folder, half):
    told = pytest.raises(ValueError, match="^MLFLOW_TRACKING_URI: has a user or a password alone: give both, by MLFLOW")
    with mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": f"http://{half}@lab:5000"}), told as said:
        use_environment(project(folder))
    assert "violet" not in str(said.value)


@pytest.mark.parametrize(
    ("own", "sent"), [({}, b"ada:violet/harbour"), ({"USERNAME": "bo", "PASSWORD": "own"}, b"bo:own")]
)
def test_a_password_in_the_address_reaches_mlflow_and_no_error_of_its_client(folder, monkeypatch, own, sent):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    heard = []

    class Ill(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_error(500)

    with ThreadingHTTPServer(("127.0.0.1", 0), Ill) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://ada:violet%2Fharbour@127.0.0.1:{server.server_port}"
        given = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} | {
            f"MLFLOW_TRACKING_{name}": value for name, value in own.items()
        }
        with mock.patch.dict(os.environ, given):
            use_environment(project(folder))
            with pytest.raises(MlflowException) as said:
                MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_experiment_by_name("x")
        server.shutdown()
    assert "harbour" not in str(said.value)
    assert heard[-1] == f"Basic {b64encode(sent).decode()}"


def test_a_length_becomes_the_step_and_the_rest_the_name():
    from tasks.entities import measured

    metrics, words = measured(
        {"perplexity": {"base": {"512": 3.5, "4096": 90}, "window": 512}, "passed": True, "why": ["a"], "no": None}
    )
    assert {(m.key, m.step): m.value for m in metrics} == {
        ("perplexity/base", 512): 3.5,
        ("perplexity/base", 4096): 90.0,
        ("perplexity/window", 0): 512.0,
        ("passed", 0): 1.0,
    }
    metrics, _ = measured({"passkey": {"512": {"value": 0.5, "low": 0.25}}, "value": 3})
    assert {(m.key, m.step): m.value for m in metrics} == {
        ("passkey", 512): 0.5,
        ("passkey/low", 512): 0.25,
        ("value", 0): 3.0,
    }
    assert words == [("why", '["a"]')]


def test_parameters_are_dotted_and_lists_are_json():
    from tasks.entities import LONGEST_PARAM, flat

    assert flat({"a": {"b": [1, 2.5], "c": None, "d": "x"}, "e": True}) == [
        ("a.b", "[1, 2.5]"),
        ("a.c", "null"),
        ("a.d", "x"),
        ("e", "true"),
    ]
    assert len(flat({"long": "x" * 7000})[0][1]) == LONGEST_PARAM


def test_a_run_says_what_it_ran_from(opened, folder):
    tracker = opened()
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params == {
        "train.rank": "16",
        "train.steps": "4",
        "train.seconds": "0.0",
        "train.fail": "false",
        "train.flaky": "0",
        "score.lengths": "[4, 2]",
        "gate.least": "1.0",
        "rivals.models": "[]",
    }
    tags = run.data.tags
    assert tags["mlflow.source.git.commit"] == dummy.git(folder, "rev-parse", "HEAD")
    assert (tags["longlora.recipe"], tags["longlora.overrides"], tags["longlora.dirty"]) == (
        "big",
        "train.steps=4",
        "false",
    )
    assert tags["mlflow.user"] == "Tester"
    assert {"env.torch", "env.dvc", "hardware.cpus", "hardware.gpus"} <= tags.keys()
    assert run.info.run_name == f"big-{tags['longlora.key'][:6]} train.steps=4"


def test_a_run_is_called_by_what_was_set_as_long_as_a_list_is_wide(folder):
    from tasks.tracking import called

    lengths = "score.lengths=[1, 2, 3, 4, 5, 6, 7, 8, 9]"
    state = snapshot(project(folder), overrides=["train.steps=4", "train.rank=8", lengths, "gate.least=0.25"])
    name = called(state)
    assert name.startswith(f"params-{state.key[:6]} train.steps=4 train.rank=8 score.lengths=[1, ")
    assert name.endswith(" ...")
    assert len(name) <= 80


def test_the_same_key_is_the_same_run(opened):
    first = opened()
    first.finish("FAILED")
    second = opened()
    assert second.run_id == first.run_id
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    second.finish("FINISHED")
    run = second.client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert len(second.client.search_runs([run.info.experiment_id])) == 1


def test_a_curve_is_followed_line_by_line_and_no_point_is_sent_twice(opened):
    tracker = opened()
    tracker.follow(
        write_history(tracker.folder, "step,loss,rate\n5,2.0,0.1\n10,1.5,0.")
    )  # the last line is being written
    assert points(tracker, "history/loss") == [(5, 2.0)]
    outs = write_history(tracker.folder, "step,loss,rate\n5,2.0,0.1\n10,1.5,0.05\n15,,0.02\n")
    tracker.follow(outs)
    tracker.follow(outs)
    again = opened()  # as a resumed flow would
    again.follow(outs)
    assert points(again, "history/loss") == [(5, 2.0), (10, 1.5)]
    assert points(again, "history/rate") == [(5, 0.1), (10, 0.05), (15, 0.02)]


def test_a_score_that_is_another_now_replaces_the_old_and_the_same_is_not_sent_again(opened):
    from tasks.comparison import Better, values_of

    for scores in (
        {"ppl": {"512": 2.0, "1024": 3.0}, "odd": float("nan"), "all": float("inf")},
        {"ppl": {"512": 0.5, "1024": 3.0}, "odd": float("nan"), "all": float("inf")},
    ):
        tracker = opened()  # resumed, on other data
        dummy.write(
            tracker.folder / "metrics" / "score.json", json.dumps({**scores, "passed": scores["ppl"]["512"] > 1})
        )
        tracker.stage("score", [Out("metrics/score.json", "metric")])
    assert values_of(tracker.client, tracker.run_id, Better("ppl", "lower")) == {512: 0.5, 1024: 3.0}
    assert tracker.client.get_run(tracker.run_id).data.metrics["passed"] == 0.0
    assert points(tracker, "ppl") == [(512, 0.5), (512, 2.0), (1024, 3.0)]
    assert len(points(tracker, "odd")) == len(points(tracker, "all")) == 1


def test_a_curve_that_is_not_there_yet_is_no_error(opened):
    tracker = opened()
    tracker.follow([Out("metrics/none.csv", "plot")])


def test_a_finished_stage_shows_metrics_pictures_and_hashes(opened):
    tracker = opened()
    folder = tracker.folder
    dummy.write(folder / "metrics" / "score.json", json.dumps({"score": {"base": {"512": 1.5}}, "verdict": "good"}))
    dummy.write(folder / "reports" / "summary.md", "# hello")
    dummy.write(folder / "reports" / "deep" / "curve.svg", "<svg/>")
    Image.new("RGB", (40, 30), "teal").save(folder / "reports" / "curve.png")
    dummy.write(folder / "models" / "weights.safetensors", "0" * 100)
    dummy.write(folder / "models" / "config.json", "{}")
    dummy.write(folder / "odd+name (1)", "1")
    outs = [
        Out("metrics/score.json", "metric", md5="a1", size=9),
        Out("reports", "out", md5="b2.dir", size=8),
        Out("models", "out", md5="c3.dir", size=102),
        Out("odd+name (1)", "out", md5="d4", size=1),
    ]
    tracker.stage("score", outs)
    opened().stage("score", outs)  # resumed: nothing doubles
    tracker.describe("# hello", "")
    tracker.tag({RECORD: "abc"})
    tracker.finish("FINISHED")

    run = tracker.client.get_run(tracker.run_id)
    assert points(tracker, "score/base") == [(512, 1.5)]
    assert (run.data.tags["verdict"], run.data.tags["longlora.record"], run.data.tags["mlflow.note.content"]) == (
        "good",
        "abc",
        "# hello",
    )
    found = sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs)
    assert found == [("models", "c3.dir"), ("odd+name (1)", "d4"), ("reports", "b2.dir")]
    assert {name: value for name, value in run.data.tags.items() if name.startswith("data.")} == {
        "data.models": "c3.dir",
        "data.odd_name _1_": "d4",
        "data.reports": "b2.dir",
    }
    files = {
        f.path
        for folder in ("", "metrics", "reports", "reports/deep")
        for f in tracker.client.list_artifacts(tracker.run_id, folder)
    }
    assert {"metrics/score.json", "reports/summary.md", "reports/deep/curve.svg", "params.yaml"} <= files
    picture = tracker.client.download_artifacts(tracker.run_id, "reports/curve.png", str(folder))
    with Image.open(picture) as shown:
        assert (shown.format, shown.size) == ("PNG", (40, 30))
    assert "models" not in files  # weights are in DVC, and only there


def test_a_server_that_is_not_there_is_said_at_once(monkeypatch):
    from tasks import tracking

    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1/x")
    with pytest.raises(ValueError, match=r"nobody answers at http://127.0.0.1:1 ") as caught:
        tracking.connect()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_server_that_takes_connections_and_never_answers_is_said(monkeypatch, variable):
    from tasks import access
    from tasks.servers import must_be_reachable

    monkeypatch.setattr(access, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv(variable, address.replace("//", "//ada:secret@"))
        with pytest.raises(ValueError, match=f"^{address} did not answer in 0.3 s: see whether it hangs$"):
            must_be_reachable(variable)


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
@pytest.mark.parametrize(
    "password", ["hunter#2secret", "hunter/2secret", "12345#secret", "hunter?2secret", "[hunter", "12/3@x"]
)
def test_a_password_that_ends_its_address_too_soon_is_said_and_not_repeated(monkeypatch, variable, password):
    from tasks.servers import must_be_reachable

    monkeypatch.setenv(variable, f"http://lab:{password}@127.0.0.1:1/api")
    with pytest.raises(ValueError) as caught:
        must_be_reachable(variable)
    said = f"{variable} is no address that can be read: percent-encode the password in {variable}"
    assert (str(caught.value), caught.value.__context__) == (said, None)  # nor in a traceback


def test_a_server_that_answered_before_is_waited_for_and_that_is_said_once(monkeypatch, capsys):
    from tasks import servers

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1/x")
    monkeypatch.setattr(servers, "reached", {("127.0.0.1", 1)})
    monkeypatch.setattr(servers, "STARTUP", 1.2)
    with pytest.raises(ValueError, match="nobody answers"):
        servers.must_be_reachable("MLFLOW_TRACKING_URI")
    assert capsys.readouterr().out == "waiting for MLflow at http://127.0.0.1:1\n"


def test_a_deleted_experiment_is_said_with_what_brings_it_back(opened, mlflow_uri):
    tracker = opened()
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    tracker.client.delete_experiment(experiment)
    with pytest.raises(ValueError) as caught:
        opened()
    restore = f"`mlflow experiments restore --experiment-id {experiment}`, and MLFLOW_TRACKING_URI={mlflow_uri}"
    assert str(caught.value).endswith(f"was deleted: bring it back with {restore}")


def test_a_run_that_ends_while_dead_ones_are_looked_for_stays_finished(opened, folder, monkeypatch):
    """Of two runs at once the one that began as the other ended said KILLED of it."""
    from tasks.tracking import mark_dead_runs
    from tasks.workspace import project

    tracker = opened()
    found = tracker.client.get_run(tracker.run_id)
    monkeypatch.setattr(tracker.client, "search_runs", lambda *_: [found])
    tracker.finish("FINISHED")
    mark_dead_runs(tracker.client, project(folder), found.info.experiment_id)
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_whose_process_is_gone_does_not_stay_running(opened, folder):
    from tasks.locks import hold
    from tasks.tracking import HOME, mark_dead_runs
    from tasks.workspace import home, project

    tracker, where = opened(), project(folder.rename(folder.with_name("o'brien's")))
    tracker.client.set_tag(tracker.run_id, HOME, home(where))
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    key = tracker.client.get_run(tracker.run_id).data.tags["longlora.key"]
    tracker.client.create_run(experiment)  # a notebook's, under way
    elsewhere = tracker.client.create_run(experiment, tags={"longlora.key": key, "longlora.home": "another:/machine"})
    status = lambda run_id: tracker.client.get_run(run_id).info.status  # noqa: E731
    with hold(where, key):
        mark_dead_runs(tracker.client, where, experiment)
        assert status(tracker.run_id) == "RUNNING"
    mark_dead_runs(tracker.client, where, experiment)
    assert (status(tracker.run_id), status(elsewhere.info.run_id)) == ("KILLED", "RUNNING")


def test_a_run_under_way_elsewhere_is_left_alone_and_one_that_ended_there_is_gone_on_with(opened, folder):
    from tasks.tags import HOME
    from tasks.workspace import home

    theirs = opened()
    client, here = theirs.client, home(project(folder))
    client.set_tag(theirs.run_id, HOME, "another:/machine")
    own = opened()
    own.finish("KILLED")
    assert own.run_id != theirs.run_id and opened().run_id == own.run_id
    run = client.get_run(theirs.run_id)
    assert (run.info.status, run.data.tags[HOME]) == ("RUNNING", "another:/machine")
    client.delete_run(own.run_id)
    client.set_terminated(theirs.run_id, "FAILED")
    assert opened().run_id == theirs.run_id
    assert client.get_run(theirs.run_id).data.tags[HOME] == here


def test_of_two_clones_runs_of_one_key_the_finished_one_is_meant(opened, folder, tmp_path):
    from tasks import runs
    from tasks.tags import HOME, KEY

    text = (folder / "dvc.yaml").read_text().replace("  dummy:\n", f"  {tmp_path.name}:\n")
    dummy.write(folder / "dvc.yaml", text)
    theirs = opened()
    theirs.client.set_tag(theirs.run_id, HOME, "another:/machine")
    own = opened()
    theirs.finish("FINISHED")
    key = own.client.get_run(own.run_id).data.tags[KEY]
    assert runs.chosen(own.client, project(folder), key[:6]).info.run_id == theirs.run_id


def test_a_run_is_finished_only_while_mlflow_has_it_as_finished(opened, folder, mlflow_uri, tmp_path, monkeypatch):
    from flows.run_dir import RunDir, is_finished
    from tasks.stages import DvcRepo
    from tasks.storage import Finished, note, record

    first, where = opened(), project(folder)
    state = snapshot(where, recipe="big", overrides=["train.steps=4"])
    dummy.write(first.folder / "dvc.lock", "schema: '2.0'\n")
    commit = record(where, state, first.folder)
    note(where, state.key, Finished(commit, first.run_id, mlflow_uri))
    told = {"longlora.record": commit, "longlora.ref": "refs/x", "longlora.verdict": ""}
    first.tag(told)
    run_dir = RunDir(where, state, first.folder, DvcRepo(first.folder, environment={}), stages=[])
    assert not is_finished(run_dir)  # it is RUNNING: an attempt that was killed
    first.finish("FINISHED")
    assert is_finished(run_dir)
    for tag in ("longlora.key", *told):  # deleted on MLflow's page: the same run again sets it
        value = first.client.get_run(first.run_id).data.tags[tag]
        first.client.delete_tag(first.run_id, tag)
        assert not is_finished(run_dir)
        first.tag({tag: value})
    assert is_finished(run_dir)
    first.client.delete_run(first.run_id)
    assert not is_finished(run_dir)
    note(where, state.key, Finished(record(where, state, first.folder), "0" * 32, mlflow_uri))
    assert not is_finished(run_dir)  # another database at the same address
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
        assert not is_finished(run_dir)
        assert not (tmp_path / "elsewhere.db").exists()


def test_after_one_failure_nothing_is_sent_but_how_the_run_ended(monkeypatch):
    from flows import mlflow_writer

    calls = []

    class Gone:
        def stage(self, name, outs):
            calls.append(name)
            raise ConnectionError("gone")

        def follow(self, outs, points):
            calls.append("follow")

        def finish(self, status):
            calls.append(status)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    monkeypatch.setattr(mlflow_writer, "open_tracker", lambda run_dir: Gone())
    sending = mlflow_writer.MlflowWriter(None)
    for name in ("one", "another"):
        sending.stage(name, [])
    sending.follow([])
    with pytest.raises(ConnectionError):
        sending.wait()
    sending.finish("FAILED")
    assert calls == ["one", "FAILED"]


def test_a_run_that_mlflow_does_not_open_is_said_while_its_first_stage_runs(monkeypatch):
    from flows import mlflow_writer

    def refuse(run_dir):
        raise ValueError("the experiment was deleted")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    monkeypatch.setattr(mlflow_writer, "open_tracker", refuse)
    sending = mlflow_writer.MlflowWriter(None)
    with pytest.raises(mlflow_writer.NotOpenedError, match="^MLflow: the experiment was deleted"):
        for _ in range(100):
            sending.follow([])
            time.sleep(0.05)
    with pytest.raises(ValueError, match="deleted"):
        sending.wait()
    sending.finish("FAILED")  # by whatever failed, which its own words must not hide
