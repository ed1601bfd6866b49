"""Which model becomes champion: recorded runs on real git and DVC, a real MLflow server."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dummy
import httpx
import pytest

from tasks import daemon, servers
from tasks.listening import LOOPBACK
from tasks.stages import Out
from tasks.storage import kept_ref, record
from tasks.tags import HEAD, KEY, RECORD, REF, VERDICT
from tasks.up import mlflow_command
from tasks.workspace import Project, project, snapshot, worktree


@pytest.fixture(scope="module")
def mlflow_server(mlflow_uri, tmp_path_factory) -> str:
    """A server on the shared store: it checks what a client on the database itself may do unchecked."""
    home = tmp_path_factory.mktemp("server")
    where, port = Project(home, home), servers.free_port()
    home.joinpath(".longlora").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        server = daemon.start(mlflow_command(where, port), home / "log")
    daemon.wait_for(f"http://{LOOPBACK}:{port}/health", server, home / "log")
    yield f"http://{LOOPBACK}:{port}"
    daemon.stop(server)


SCORES = {
    "good": (2.0, True),
    "better": (4.0, True),
    "worse": (1.5, True),
    "refused": (7.5, False),
    "unfinished": (9.0, True),
}


@pytest.fixture(scope="module")
def shop(template, tmp_path_factory, mlflow_server):
    """A project with recorded runs, by name: their keys. Their files are written by hand, and recorded as a flow records them."""
    from mlflow.entities import Metric

    from tasks import tracking

    folder = tmp_path_factory.mktemp("promote")
    dummy.git(folder, "clone", "--quiet", str(template), "dummy")
    folder = folder / "dummy"
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    patch.setenv("GIT_CONFIG_COUNT", "1")
    patch.setenv("GIT_CONFIG_KEY_0", "user.name")
    patch.setenv("GIT_CONFIG_VALUE_0", "Ada")
    client, where, keys = tracking.connect(), project(folder), {}
    for name, (score, passed) in SCORES.items():
        rules = [
            {"name": "size", "passed": passed, "reason": f"{score} at 4"},
            {"name": "whole", "passed": True, "reason": ""},
        ]
        dummy.write(folder / "verdict.json", json.dumps({"passed": passed, "rules": rules}))
        state = snapshot(where)
        work = worktree(where, state)
        dummy.write(work / "dvc.lock", "schema: '2.0'\n")
        tracker = tracking.Tracker(client, where, state, experiment="dummy", folder=work)
        client.log_batch(
            tracker.run_id, metrics=[Metric("score/tuned", score, 0, 4), Metric("score/tuned", 100.0, 0, 2)]
        )
        tracker.stage("fetch", [Out("models/base", "out", md5="a1.dir", size=1)])
        if name != "unfinished":
            commit = record(where, state, work)
            tracker.tag({RECORD: commit, REF: kept_ref(commit), VERDICT: "verdict.json"})
            tracker.finish("FINISHED")
        keys[name] = state.key
    yield folder, keys
    patch.undo()


@pytest.fixture
def empty(shop):
    """The shop, its registry empty; a function that promotes, the client, and the project."""
    from mlflow.exceptions import MlflowException

    from tasks import promotion, runs, tracking

    folder, keys = shop
    client, where = tracking.connect(), project(folder)
    try:
        client.delete_registered_model("dummy")
    except MlflowException as error:
        assert error.error_code == "RESOURCE_DOES_NOT_EXIST"
    promote = lambda name: promotion.promote(client, where, runs.chosen(client, where, keys[name]))  # noqa: E731
    return promote, client, where


def alias(client, name: str) -> str | None:
    from tasks.registry import holder

    version = holder(client, "dummy", name)
    return str(version.version) if version else None


def test_the_first_that_passes_becomes_champion_by_reference(empty, shop):
    promote, client, where = empty
    assert promote("good") == "dummy version 1 is champion: the verdict passed"
    assert (alias(client, "champion"), alias(client, "candidate")) == ("1", "1")
    version = client.get_model_version("dummy", "1")
    run = client.get_run(version.run_id)
    commit = run.data.tags["longlora.record"]
    assert version.source == f"dvc://dummy/models/tuned?rev={commit}&repo={where.root}&ref={kept_ref(commit)}"
    assert version.tags["longlora.key"] == shop[1]["good"]
    assert client.get_registered_model("dummy").description == "A model of a few letters."


JUDGED = """
fit: {steps: 3}
gate:
  rules: [{name: it is, metric: integrity/whole}]
  more_rules: [{name: it gains, metric: perplexity/extended/target, at_most: 1e-1}]
  not_asked: []
licence: {checked: [mine]}
"""
MORE = "{name: it gains, metric: perplexity/extended/target, at_most: 1e-1}, {name: it finds, metric: needle/extended}"


@pytest.fixture
def judged(folder, monkeypatch):
    """What a promotion says of the rules that a run of these words was judged by."""
    from tasks import promotion, tracking

    dummy.write(folder / "params.yaml", JUDGED)
    dummy.commit(folder)
    where, verdict = project(folder), {"passed": True, "rules": []}
    monkeypatch.setattr(promotion, "verdict_of", lambda where, run: verdict)

    def say(*overrides: str, recipe: str | None = None) -> str:
        state = snapshot(where, recipe=recipe, overrides=list(overrides))
        tags = {**tracking.origin(where, state), RECORD: state.commit}
        return promotion.judged_by(where, SimpleNamespace(data=SimpleNamespace(tags=tags)))

    return say


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("gate.rules=[{name: mine, metric: integrity/whole}]", "gate.rules"),
        ("gate={rules: []}", "gate.rules"),
        ("gate[rules]=[]", "gate.rules"),
        ("[gate].rules=[]", "gate.rules"),
        ("gate.more_rules=[]", "gate.more_rules"),
        ("licence.checked=[mine, anything]", "licence.checked"),
    ],
)
def test_rules_that_were_set_for_the_run_are_told_however_they_were_written(judged, override, told):
    assert judged("fit.steps=9", override) == f"the verdict passed by rules that were set for this run ({told})"


@pytest.mark.parametrize(
    "override", ["fit.steps=9", f"gate.more_rules=[{MORE}]", "gate.not_asked=[{name: it is, why: no}]"]
)
def test_rules_that_stand_as_they_are_need_no_word(judged, override):
    assert judged(override) == "the verdict passed"


def test_a_rule_that_was_changed_and_not_committed_is_told(judged, folder):
    dummy.write(folder / "params.yaml", JUDGED.replace("1e-1", "1e+1"))
    assert judged() == "the verdict passed by rules that were set for this run (gate.more_rules)"
    dummy.commit(folder)
    assert judged() == "the verdict passed"


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("gate: {rules: [{name: mine, metric: integrity/whole}]}", "gate.rules"),
        ("gate: {more_rules: [{name: mine, metric: needle/extended}]}", "gate.more_rules"),
        ("licence: {checked: [anything]}", "licence.checked"),
        (f"gate: {{more_rules: [{MORE}]}}", ""),
        ("fit: {steps: 9}", ""),
    ],
)
@pytest.mark.parametrize("kept", ["committed", "ignored", "a link"])
def test_rules_of_a_recipe_are_told_wherever_the_recipe_is(judged, folder, tmp_path, recipe, told, kept):
    own = folder / "recipes" / "own.yaml"
    dummy.write(tmp_path / "own.yaml" if kept == "a link" else own, recipe)
    if kept == "a link":
        own.symlink_to(tmp_path / "own.yaml")
    if kept == "ignored":
        (folder / ".git" / "info" / "exclude").write_text("/recipes/own.yaml\n")
    else:
        dummy.commit(folder)
    said = f" by rules that recipe own has instead of the gate's ({told})" if told else ""
    assert judged(recipe="own") == f"the verdict passed{said}"


def test_what_a_verdict_was_passed_by_is_kept_in_the_history(empty, shop):
    from tasks import registry, runs

    promote, client, where = empty
    run = runs.chosen(client, where, shop[1]["good"])
    params = (where.tree / "params.yaml").read_text()
    try:
        dummy.write(where.tree / "params.yaml", params.replace("least: 1.0", "least: 3.0"))
        dummy.commit(where.tree)
        client.set_tag(run.info.run_id, HEAD, dummy.git(where.tree, "rev-parse", "HEAD"))
        said = "the verdict passed by rules that were set for this run (gate.least)"
        assert promote("good") == f"dummy version 1 is champion: {said}"
        assert registry.moves(client, "dummy")[-1].why == said
    finally:
        dummy.write(where.tree / "params.yaml", params)
        dummy.commit(where.tree)
        client.set_tag(run.info.run_id, HEAD, run.data.tags[HEAD])


def test_a_run_whose_record_is_not_in_this_clone_is_named_with_what_fetches_it(empty, shop):
    from tasks import promotion, runs

    _, client, where = empty
    run = runs.chosen(client, where, shop[1]["good"])
    client.set_tag(run.info.run_id, RECORD, "0" * 40)
    try:
        with pytest.raises(
            ValueError, match=rf"^run {shop[1]['good']} points to 0{{12}}, which is not in this clone: .*git fetch"
        ):
            promotion.nothing_to_do(client, where, runs.chosen(client, where, shop[1]["good"]))
    finally:
        client.set_tag(run.info.run_id, RECORD, run.data.tags[RECORD])


def test_a_champion_whose_run_was_resumed_on_other_data_is_measured_by_its_own_record_alone(empty, shop):
    from mlflow.entities import Metric

    from flows.cli.reproduce import find
    from tasks import beside, registry, runs, tracking
    from tasks.comparison import Better
    from tasks.promotion import RefusalError, objections, promote

    _, client, where = empty

    def finished(state, score: float, model: str) -> tuple[str, Any]:
        work = worktree(where, state)
        out = f"    outs:\n    - path: models/tuned\n      md5: {model}\n"
        dummy.write(work / "dvc.lock", f"schema: '2.0'\nstages:\n  train:\n    cmd: x\n{out}")
        tracker = tracking.Tracker(client, where, state, experiment="dummy", folder=work)
        tracker.stage("train", [Out("models/tuned", "out", md5=model, size=1)])
        tracker.stage("fetch", [Out("models/base", "out", md5="a1.dir", size=1)])
        client.log_batch(tracker.run_id, metrics=[Metric("score/tuned", score, 0, 4)])
        commit = record(where, state, work)
        tracker.tag({RECORD: commit, REF: kept_ref(commit), VERDICT: "verdict.json"})
        tracker.finish("FINISHED")
        return commit, client.get_run(tracker.run_id)

    dummy.write(where.root / "verdict.json", json.dumps({"passed": True, "rules": []}))
    state = snapshot(where, overrides=["train.rank=77"])
    first, run = finished(state, 3.0, "01.dir")
    promote(client, where, run)
    finished(state, 9.0, "02.dir")  # the same run again, elsewhere
    for ask in (lambda: runs.chosen(client, where, "champion"), lambda: find(where, "champion")):
        with pytest.raises(
            ValueError, match=f"^dummy version 1 is of record {first[:12]}, and its run {state.key} was resumed"
        ):
            ask()
    with pytest.raises(RefusalError, match=f"\n  better: dummy version 1 is of record {first[:12]}"):
        promote(client, where, runs.chosen(client, where, shop[1]["better"]))

    added = beside.addition(client, where, "champion")
    assert "md5: 01.dir" in added.files["rivals/champion.dvc"]
    _, challenger = finished(snapshot(where, overrides=["train.rank=78"], additions=[added]), 4.0, "03.dir")
    client.log_metric(challenger.info.run_id, "score/champion", 5.0, step=4)
    champion = registry.holder(client, "dummy", "champion")
    (reason,) = objections(client, where, challenger, champion, [Better("score/tuned", "higher", data="models/base")])
    assert reason == "better: score/tuned at 4 is 4, and must be higher than 5 of champion version 1"
    for each in (run, challenger):
        client.delete_run(each.info.run_id)


def test_rules_that_were_not_asked_are_told_with_the_promotion(empty, monkeypatch):
    from tasks import promotion

    promote, _, _ = empty
    verdict = {"passed": True, "rules": [], "not_asked": [{"name": "it is fast", "why": "no clock"}]}
    monkeypatch.setattr(promotion, "verdict_of", lambda where, run: verdict)
    said = "the verdict passed, 1 of the gate's rules not asked (its page says which, and why)"
    assert promote("good") == f"dummy version 1 is champion: {said}"


def test_a_better_one_takes_over_and_a_worse_one_is_told_why(empty):
    from tasks.promotion import RefusalError

    promote, client, _ = empty
    promote("good")
    with pytest.raises(RefusalError) as caught:
        promote("worse")
    assert str(caught.value).splitlines() == [
        "dummy version 2 stays candidate, champion stays version 1:",
        "  better: score/tuned at 4 is 1.5, and must be higher than 2 of champion version 1",
    ]
    assert (alias(client, "champion"), alias(client, "candidate")) == ("1", "2")
    assert (
        promote("better")
        == "dummy version 3 is champion: the verdict passed, and score/tuned is higher than version 1's"
    )
    assert alias(client, "champion") == "3"


def test_a_champion_does_not_fall_to_one_that_wins_by_a_hair_and_loses_keys(empty, shop, monkeypatch):
    from mlflow.entities import Metric

    from tasks import promotion, registry, runs
    from tasks.comparison import Better

    promote, client, where = empty
    comparisons = [
        Better("score/tuned", "higher"),
        Better("keys/tuned", "higher", no_worse_than=0.05),
    ]
    monkeypatch.setattr(promotion, "comparisons_of", lambda model: comparisons)

    def found(name: str, keys: int) -> None:
        run = runs.chosen(client, where, shop[1][name]).info.run_id
        client.log_batch(run, metrics=[Metric("keys/tuned", keys / 40, keys, 4)])

    found("good", 40)
    promote("good")
    found("better", 34)
    with pytest.raises(promotion.RefusalError) as caught:
        promote("better")
    assert str(caught.value).splitlines()[1:] == [
        "  better: keys/tuned at 4 is 0.85, and must be at most 0.05 below 1 of champion version 1"
    ]
    found("better", 38)
    assert promote("better").endswith(
        "the verdict passed, and score/tuned is higher than version 1's, and keys/tuned is at most 0.05 below version 1's"
    )
    assert "keys/tuned is at most 0.05 below version 1's" in registry.moves(client, "dummy")[-1].why


@pytest.mark.parametrize(
    ("order", "ours", "theirs"), [("lower", 3.05, 3.0), ("higher", 0.95, 1.0), ("higher", 0.825, 0.875)]
)
def test_what_is_lost_by_just_the_tolerance_holds(order, ours, theirs):
    from tasks.comparison import Better

    assert Better("m", order, no_worse_than=0.05).holds(ours, theirs)
    assert not Better("m", order, no_worse_than=0.05).holds(theirs + (ours - theirs) * 1.01, theirs)
    assert not Better("m", order).holds(ours, theirs) and Better("m", order).holds(theirs, ours)
    assert not Better("m", order, no_worse_than=0.05).holds(float("nan"), theirs)


def test_ours_must_read_better_lose_few_keys_and_reach_as_far(shop):
    from tasks.comparison import comparisons_of
    from tasks.outputs import artifacts_at

    (model,) = (artifact for artifact in artifacts_at(Path(__file__).parents[1], None) if artifact.type == "model")
    reads, finds, reaches = comparisons_of(model)
    assert (reads.metric, reads.order, reads.no_worse_than) == ("perplexity/extended", "lower", None)
    assert (finds.metric, finds.order, finds.no_worse_than) == ("passkey/extended", "higher", 0.05)
    assert reaches.metric == "integrity/target"
    assert [reaches.holds(context, 4096) for context in (1024, 4096, 8192)] == [False, True, True]


def test_a_refused_verdict_gives_every_reason_even_without_a_champion(empty):
    from tasks.promotion import RefusalError

    promote, client, _ = empty
    with pytest.raises(RefusalError) as caught:
        promote("refused")
    assert str(caught.value).splitlines() == [
        "dummy version 1 stays candidate, there is no champion:",
        "  size: 7.5 at 4",
    ]
    assert (alias(client, "champion"), alias(client, "candidate")) == (None, "1")


def test_the_same_run_twice_is_one_version_and_one_move(empty):
    from tasks import registry

    promote, client, _ = empty
    promote("good")
    assert promote("good") == "dummy version 1 is the champion already"
    assert len(client.search_model_versions("name = 'dummy'")) == 1
    assert len(registry.moves(client, "dummy")) == 1


def test_what_is_equal_is_not_better(empty, shop):
    from tasks import promotion, registry, runs
    from tasks.comparison import Better

    _, client, where = empty
    run = runs.chosen(client, where, shop[1]["good"])
    source, _ = runs.source_and_model(where, run)
    version = registry.register(client, "dummy", source=source, run=run, desc="", labels=[])
    (reason,) = promotion.objections(client, where, run, version, [Better("score/tuned", "higher")])
    assert reason == "better: score/tuned at 4 is 2, and must be higher than 2 of champion version 1"
    (reason,) = promotion.objections(client, where, run, version, [Better("score/none", "lower")])
    assert reason == "better: score/none is missing in this run"


def test_of_a_run_resumed_on_other_data_the_record_says_what_it_was_measured_on(empty, shop):
    from tasks import runs, tracking
    from tasks.comparison import Better, differing

    _, client, where = empty
    dummy.write(where.root / "verdict.json", "{}")
    state = snapshot(where)
    work = worktree(where, state)
    for data in ("b1.dir", "b2.dir", "b1.dir"):  # the first state again: MLflow has both, and keeps no order
        lock = f"schema: '2.0'\nstages:\n  fetch:\n    cmd: x\n    outs:\n    - path: models/base\n      md5: {data}\n"
        dummy.write(work / "dvc.lock", lock)
        tracker = tracking.Tracker(client, where, state, experiment="dummy", folder=work)
        tracker.stage("fetch", [Out("models/base", "out", md5=data, size=1)])
        commit = record(where, state, work)
        tracker.tag({RECORD: commit, REF: kept_ref(commit)})
        tracker.finish("FINISHED")
        assert runs.digests_of(where, client.get_run(tracker.run_id)) == {"models/base": data}
    good = runs.chosen(client, where, shop[1]["good"]).info.run_id
    better = Better("ppl", "lower", data="models/base")
    assert differing(client, where, tracker.run_id, good, better) == "models/base"
    assert differing(client, where, tracker.run_id, tracker.run_id, better) == ""
    client.delete_run(tracker.run_id)


def test_models_are_compared_at_the_longest_length_that_both_have(empty, shop):
    from mlflow.entities import Metric, Param

    from tasks import runs
    from tasks.comparison import Better, shortfall

    _, client, where = empty
    home = runs.chosen(client, where, shop[1]["good"]).info.experiment_id
    made = []
    for scores in ({512: 3.0, 1024: 5.0, 4096: 9.0}, {512: 2.0, 1024: 6.0}, {8192: 1.0}):
        made.append(client.create_run(home, tags={"mlflow.runName": "made by hand"}).info.run_id)
        client.log_batch(made[-1], metrics=[Metric("ppl", value, 0, step) for step, value in scores.items()])
    assert shortfall(client, where, made[0], made[1], "3", Better("ppl", "lower")) == []
    assert shortfall(client, where, made[1], made[0], "3", Better("ppl", "lower", step=512)) == []
    (reason,) = shortfall(client, where, made[1], made[0], "3", Better("ppl", "lower"))
    assert reason == "better: ppl at 1024 is 6, and must be lower than 5 of champion version 3"
    for run, seed in zip(made, (1, 1, 7), strict=True):
        client.log_batch(run, params=[Param("perplexity.seed", str(seed)), Param("fit.seed", str(run))])
    at_places = Better("ppl", "lower", params=["perplexity", "precision"])
    assert shortfall(client, where, made[0], made[1], "3", at_places) == []
    for asked in (at_places, Better("ppl", "lower", params="perplexity")):  # as records from before have it
        (reason,) = shortfall(client, where, made[2], made[1], "3", asked)
        assert reason.startswith("better: perplexity.seed = 7 is not what champion version 3 was measured on")
    client.log_batch(made[0], params=[Param("precision.dtype", "bfloat16")])
    (reason,) = shortfall(client, where, made[0], made[1], "3", at_places)
    assert reason.startswith("better: precision.dtype = bfloat16 is not what champion version 3 was measured on")
    (reason,) = shortfall(client, where, made[2], made[1], "3", Better("ppl", "lower"))
    assert reason == "better: ppl of this run is at 8192, and the champion's 512, 1024: nothing to compare"
    good = runs.chosen(client, where, shop[1]["good"]).info.run_id
    (reason,) = shortfall(client, where, good, made[0], "3", Better("ppl", "lower", data="models/base"))
    assert reason == (
        "better: models/base is not what champion version 3 was measured on, so they cannot be compared; "
        "`longlora run --beside champion` measures both"
    )
    for run in made:
        client.delete_run(run)


@pytest.mark.parametrize("run_id", [None, "0" * 32])
def test_a_champion_without_a_run_is_named_and_so_is_the_way_out(empty, run_id):
    from tasks import runs
    from tasks.promotion import RefusalError

    promote, client, where = empty
    client.create_registered_model("dummy")
    client.create_model_version("dummy", "dvc://dummy/p?rev=r&repo=q", run_id=run_id)
    client.set_registered_model_alias("dummy", "champion", "1")
    with pytest.raises(
        RefusalError, match=r"\n  better: dummy version 1 has no run in MLflow, so .* take its alias away"
    ):
        promote("good")
    with pytest.raises(ValueError, match="^dummy version 1 has no run in MLflow"):
        runs.chosen(client, where, "champion")
    client.delete_registered_model_alias("dummy", "champion")
    assert promote("good") == "dummy version 2 is champion: the verdict passed"


def test_rollback_returns_to_the_one_before_and_says_so(empty):
    from tasks import promotion, registry

    promote, client, where = empty
    with pytest.raises(ValueError, match="^dummy has no champion yet: `longlora promote`"):
        promotion.rollback(client, where, "")
    promote("good")
    promote("better")
    assert promotion.rollback(client, where, "it answers in rhyme") == "dummy version 1 is champion again"
    assert alias(client, "champion") == "1"
    last = registry.moves(client, "dummy")[-1]
    assert (last.how, last.origin, last.to, last.who, last.why) == ("rollback", "2", "1", "Ada", "it answers in rhyme")
    with pytest.raises(ValueError, match="had no champion before"):
        promotion.rollback(client, where, "")


def test_a_rollback_goes_to_any_earlier_champion_and_the_next_one_goes_on_from_there(empty, shop):
    from tasks import promotion, registry, runs

    promote, client, where = empty
    promote("good")
    promote("better")
    run = runs.chosen(client, where, shop[1]["worse"])
    client.create_model_version("dummy", "dvc://dummy/p?rev=r", run_id=run.info.run_id, tags={KEY: shop[1]["worse"]})
    client.set_registered_model_alias("dummy", "champion", "3")  # by hand
    assert promotion.rollback(client, where, "", to="1") == "dummy version 1 is champion again"
    with pytest.raises(ValueError, match="had no champion before"):  # it was the first
        promotion.rollback(client, where, "")
    assert promotion.rollback(client, where, "", to=shop[1]["better"][:8]) == "dummy version 2 is champion again"
    assert promotion.rollback(client, where, "") == "dummy version 1 is champion again"
    there = f"there are version 2 ({shop[1]['better']}), version 3 ({shop[1]['worse']})"
    for wrong in ("1", "7", "never", ""):  # 1 is champion now
        with pytest.raises(ValueError) as caught:
            promotion.rollback(client, where, "", to=wrong)
        assert str(caught.value) == f"--to {wrong}: no earlier champion has this version or key; {there}"
    assert alias(client, "champion") == "1" == registry.moves(client, "dummy")[-1].to


def test_rollback_counts_a_move_made_by_hand_and_never_goes_where_it_is(empty, shop):
    from tasks import promotion, registry, runs

    promote, client, where = empty
    promote("good")
    promote("better")
    run = runs.chosen(client, where, shop[1]["good"])
    client.create_model_version("dummy", "dvc://dummy/p?rev=r&repo=q", run_id=run.info.run_id)
    client.set_registered_model_alias("dummy", "champion", "3")  # by hand
    assert promotion.rollback(client, where, "") == "dummy version 2 is champion again"
    assert promotion.rollback(client, where, "") == "dummy version 1 is champion again"
    assert [(move.how, move.origin, move.to) for move in registry.moves(client, "dummy")[2:]] == [
        ("found", "2", "3"),
        ("rollback", "3", "2"),
        ("rollback", "2", "1"),
    ]
    registry.move(client, "dummy", "1", how="promote", who="a", why="the champion already", run="r")
    with pytest.raises(
        ValueError, match="^dummy version 1 is champion, and by the record was so before too: .*history`$"
    ):
        promotion.rollback(client, where, "")


def test_a_rollback_to_a_deleted_version_is_one_line_and_moves_nothing(empty):
    from tasks import promotion, registry

    promote, client, where = empty
    promote("good")
    promote("better")
    client.delete_model_version("dummy", "1")
    with pytest.raises(
        ValueError,
        match="^dummy version 1 was deleted: `longlora history` has the others, `longlora rollback --to` takes",
    ):
        promotion.rollback(client, where, "")
    assert alias(client, "champion") == "2" and len(registry.moves(client, "dummy")) == 2


def test_a_run_is_chosen_by_a_beginning_and_must_be_finished(empty, shop):
    from tasks import promotion, runs

    _, client, where = empty
    key = shop[1]["better"]
    assert runs.chosen(client, where, key[:5]).data.tags["longlora.key"] == key
    assert runs.chosen(client, where, None).data.tags["longlora.key"] == shop[1]["refused"]  # the last that finished
    with pytest.raises(ValueError, match="no run 'zzz'"):
        runs.chosen(client, where, "zzz")
    with pytest.raises(ValueError, match="could be"):
        runs.chosen(client, where, "")
    unfinished = runs.chosen(client, where, shop[1]["unfinished"])
    client.update_run(unfinished.info.run_id, status="RUNNING")  # another test's run may have found its process gone
    with pytest.raises(ValueError, match="is running, and only of a finished one is there a model"):
        promotion.promote(client, where, runs.chosen(client, where, shop[1]["unfinished"]))


def test_a_run_whose_tags_were_deleted_on_mlflows_page_is_told_how_it_gets_them_back(empty, shop):
    from tasks import promotion, registry, runs

    _, client, where = empty
    run = runs.chosen(client, where, shop[1]["better"])
    promotion.promote(client, where, run)
    lost = (
        f"^run {shop[1]['better']} has lost tags in MLflow by which its record is found: the same run again sets them"
    )
    for tag in ("longlora.record", "longlora.ref"):
        client.delete_tag(run.info.run_id, tag)
        with pytest.raises(ValueError, match=lost):
            runs.source_and_model(where, runs.chosen(client, where, shop[1]["better"]))
    with pytest.raises(ValueError, match=lost):
        runs.maker(client, registry.holder(client, "dummy", "champion"))
    for tag in ("longlora.record", "longlora.ref"):  # what is in the shop is for the tests that follow, too
        client.set_tag(run.info.run_id, tag, run.data.tags[tag])


def test_a_finished_run_of_a_notebook_is_not_the_last_of_ours(empty, shop):
    from flows.cli.reproduce import find
    from tasks import promotion, runs

    _, client, where = empty
    ours = runs.chosen(client, where, None)
    notebook = client.create_run(ours.info.experiment_id)
    client.set_terminated(notebook.info.run_id, "FINISHED")
    assert runs.chosen(client, where, None).info.run_id == ours.info.run_id
    assert find(where, None).key == shop[1]["refused"]
    for act in (
        lambda: promotion.promote(client, where, runs.chosen(client, where, notebook.info.run_id)),
        lambda: find(where, notebook.info.run_id),
    ):
        with pytest.raises(
            ValueError, match=f"^run {notebook.info.run_id} was not made by `longlora run`, so there is"
        ):
            act()
    client.delete_run(notebook.info.run_id)


TWENTY = """
import os, sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tasks import promotion, runs, tracking
from tasks.workspace import project
folder, *keys = sys.argv[1:]
children = []
for number in range(20):
    child = os.fork()  # before anything is connected
    if child:
        children.append(child)
        continue
    client, where = tracking.connect(), project(Path(folder))
    try:
        promotion.promote(client, where, runs.chosen(client, where, keys[number % len(keys)]))
    except promotion.RefusalError:
        os._exit(3)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print("statuses", *sorted(statuses))
"""


@pytest.mark.slow
def test_twenty_processes_at_once_leave_one_champion_and_an_unbroken_record(empty, shop, mlflow_server):
    from tasks import registry

    _, client, _ = empty
    folder, keys = shop
    env = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server}
    command = [
        sys.executable,
        "-c",
        TWENTY,
        str(folder),
        *(keys[name] for name in ("worse", "good", "better", "refused")),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    statuses = done.stdout.splitlines()[-1].split()[1:]
    assert len(statuses) == 20 and set(statuses) <= {"0", "3"}, done.stderr
    versions = {str(v.version): v.tags["longlora.key"] for v in client.search_model_versions("name = 'dummy'")}
    assert sorted(versions.values()) == sorted(keys[name] for name in ("worse", "good", "better", "refused"))
    champion = alias(client, "champion")
    assert versions[champion] == keys["better"]
    record = registry.moves(client, "dummy")
    assert [move.origin for move in record] == [None, *(move.to for move in record[:-1])]
    assert record[-1].to == champion
    assert {move.how for move in record} == {"promote"}
    assert len({move.to for move in record}) == len(record)  # each moved once: a worse one never came back


@pytest.fixture
def losing(mlflow_server) -> Iterator[str]:
    """The address of a way to the MLflow server on which the first answer to each request that makes something is lost."""
    lost: set[str] = set()

    class Way(http.server.BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {"content-type": self.headers.get("content-type", "")}
            reply = httpx.request(self.command, f"{mlflow_server}{self.path}", content=body, headers=headers)
            if self.path.endswith("/create") and self.path not in lost:
                lost.add(self.path)
                return  # as if the server had been killed now
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_GET = do_POST = do_PATCH = do_DELETE = pass_on  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Way) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    assert len(lost) == 4


def test_an_answer_that_was_lost_on_its_way_makes_no_second_run_and_no_second_version(
    folder, losing, tmp_path, monkeypatch
):
    from tasks import registry, tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", losing)
    client, where, name = tracking.connect(), project(folder), tmp_path.name
    state = snapshot(where)
    tracker = tracking.Tracker(client, where, state, experiment=name, folder=worktree(where, state))
    run = client.get_run(tracker.run_id)
    version = registry.register(client, name, source=f"dvc://{name}/x", run=run, desc="", labels=[])
    assert [each.info.run_id for each in client.search_runs([run.info.experiment_id])] == [tracker.run_id]
    assert [each.version for each in client.search_model_versions(f"name = '{name}'")] == [version.version]


def test_hooks_hear_of_promotion_refusal_and_rollback(empty, shop, listener, monkeypatch, tmp_path):
    from tasks import promotion

    promote, client, where = empty
    got, address = listener
    monkeypatch.setenv("LONGLORA_HOOK_URL", f"{address}/hook")
    (tmp_path / "hook.py").write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    monkeypatch.setenv("LONGLORA_HOOK_COMMAND", f"{sys.executable} {tmp_path}/hook.py {tmp_path}/heard")
    promote("good")
    promote("good")  # the champion already: nothing happened
    with pytest.raises(promotion.RefusalError):
        promote("refused")
    promote("better")
    promotion.rollback(client, where, "it answers in rhyme")
    assert [each["event"] for each in got] == ["promoted", "refused", "promoted", "rolled back"]
    third = {name: got[2][name] for name in ("model", "key", "origin", "to", "who")}
    assert third == {"model": "dummy", "key": shop[1]["better"], "origin": "1", "to": "3", "who": "Ada"}
    assert got[1]["message"].endswith("size: 7.5 at 4")
    assert (got[3]["why"], got[3]["key"]) == ("it answers in rhyme", shop[1]["good"])
    heard = (tmp_path / "heard").read_text()
    assert heard == "".join(json.dumps(each) for each in got)


def test_a_rollback_is_said_before_its_hooks_which_may_be_interrupted(empty, monkeypatch, capsys):
    from flows.cli import promotion_commands
    from tasks import hooks

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    promote, _, where = empty
    promote("good")
    promote("better")
    monkeypatch.chdir(where.root)
    monkeypatch.setattr(hooks, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        promotion_commands.rollback(why="it answers in rhyme", to=None)
    assert capsys.readouterr().out == "dummy version 1 is champion again\n"


def test_a_hook_that_fails_is_said_without_its_secrets_and_the_move_stands(
    empty, listener, monkeypatch, capsys, caplog
):
    promote, client, _ = empty
    caplog.set_level("INFO")
    monkeypatch.setenv("LONGLORA_HOOK_URL", f"{listener[1]}/no/T0K3N?key=s3cret")
    monkeypatch.setenv("LONGLORA_HOOK_COMMAND", f"{sys.executable} -c 'raise SystemExit(4)'")
    promote("good")
    assert alias(client, "champion") == "1"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [
        "warning: LONGLORA_HOOK_URL: 127.0.0.1 did not take it (status 500); 'promoted' stands, and was not told",
        "warning: LONGLORA_HOOK_COMMAND: ended with status 4; 'promoted' stands, and was not told",
    ]
    assert "T0K3N" not in caplog.text


@pytest.fixture
def blocks(prefect_url, monkeypatch):
    """Prefect's server, where blocks are, as what a command finds; nothing in the environment names it."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks import servers

    @contextmanager
    def prefect_api(where, **_):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", prefect_url)
            yield lambda: None

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "prefect_api", prefect_api)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


def test_a_notification_block_of_prefect_hears_of_it_though_no_server_is_named(
    shop, blocks, listener, monkeypatch, capsys
):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    from tasks import hooks

    got, address = listener
    fields = {"title": "{{subject}}", "text": "{{body}}", "token": "{{token}}"}
    block = CustomWebhookNotificationBlock(
        name="ops", url=f"{address}/hook", json_data=fields, secrets={"token": "T0K3N"}
    )
    block.save("ops", overwrite=True)
    monkeypatch.chdir(shop[0])
    monkeypatch.setenv("LONGLORA_HOOK_BLOCK", "custom-webhook/ops")
    hooks.tell("failed", "stage 'fit': no memory", key="3f2a91", model=None)
    assert capsys.readouterr().err == ""
    assert got == [{"title": "longlora: failed", "text": "stage 'fit': no memory\nkey: 3f2a91", "token": "T0K3N"}]


def test_a_block_that_fails_is_said_without_its_secrets(shop, blocks, listener, monkeypatch, capfd, caplog):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from prefect.blocks.system import Secret

    from tasks import hooks

    caplog.set_level("INFO")
    got, address = listener
    CustomWebhookNotificationBlock(name="no", url=f"{address}/no/T0K3N", json_data={}).save("no", overwrite=True)
    SlackWebhook(url=f"{address.replace('http', 'json')}/no/T0K3N").save("no", overwrite=True)
    Secret(value="T0K3N").save("no", overwrite=True)
    monkeypatch.chdir(shop[0])
    for block, said in {
        "custom-webhook/no": "custom-webhook/no did not take it (HTTPStatusError)",
        "slack-webhook/no": "slack-webhook/no did not take it (NotificationError)",
        "secret/no": "secret/no is no notification block",
        "slack-webhook/none": "Prefect has no block slack-webhook/none: make it on its page (`longlora up`)",
        "team": "must be a block's type and name, such as slack-webhook/team",
    }.items():
        monkeypatch.setenv("LONGLORA_HOOK_BLOCK", block)
        hooks.tell("failed", "it ended", key="3f2a91")
        out, err = capfd.readouterr()
        assert (out, err) == ("", f"warning: LONGLORA_HOOK_BLOCK: {said}; 'failed' stands, and was not told\n")
    assert len(got) == 2
    assert "T0K3N" not in caplog.text


def test_a_block_without_a_server_is_one_line(shop, monkeypatch, capsys):
    from tasks import hooks

    monkeypatch.chdir(shop[0])
    monkeypatch.setenv("LONGLORA_HOOK_BLOCK", "slack-webhook/team")
    monkeypatch.setenv("PREFECT_API_URL", "http://ada:s3cret@127.0.0.1:9/api")
    hooks.tell("failed", "it ended")
    said = capsys.readouterr().err
    assert said.startswith("warning: LONGLORA_HOOK_BLOCK: nobody answers at http://127.0.0.1:9 (")
    assert said.endswith("): start it, or change PREFECT_API_URL; 'failed' stands, and was not told\n")
    assert said.count("\n") == 1


def test_a_hook_whose_own_server_cannot_be_started_is_one_line(folder, monkeypatch, capsys):
    from tasks import hooks

    (folder / ".longlora" / "prefect.log").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGLORA_HOOK_BLOCK", "slack-webhook/team")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    hooks.tell("rolled back", "it answers in rhyme")
    assert capsys.readouterr().err == (
        f"warning: LONGLORA_HOOK_BLOCK: [Errno 21] Is a directory: '{folder}/.longlora/prefect.log'; "
        "'rolled back' stands, and was not told\n"
    )


def test_a_hook_whose_own_server_is_lost_ends_nothing_and_has_it_not_again(folder, monkeypatch, capfd):
    import psutil
    from test_daemon import ANSWERS

    from tasks import hooks

    (folder / ".longlora").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGLORA_HOOK_BLOCK", "slack-webhook/team")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(daemon, "PAUSE", 0.0)
    monkeypatch.setattr(servers, "prefect_command", lambda port, **_: [sys.executable, "-c", ANSWERS, str(port)])
    others = psutil.Process().children()

    def give(*_: object) -> str:
        (supervisor,) = [each for each in psutil.Process().children() if each not in others]
        for each in supervisor.children():
            each.kill()
        time.sleep(1)  # as long as a restart would take
        return "it is lost"

    monkeypatch.setattr(hooks, "give", give)
    hooks.tell("rolled back", "it answers in rhyme")
    said = capfd.readouterr().err
    assert said == "warning: LONGLORA_HOOK_BLOCK: it is lost; 'rolled back' stands, and was not told\n"


def test_a_block_that_takes_too_long_is_not_waited_for(folder, monkeypatch, capsys):
    from tasks import hooks

    ended = threading.Event()
    monkeypatch.setattr(servers, "prefect_api", lambda where, **_: nullcontext(lambda: None))
    monkeypatch.setattr(hooks, "give", lambda *_: str(ended.wait(20)))
    monkeypatch.setattr(hooks, "LONG", 0.1)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGLORA_HOOK_BLOCK", "slack-webhook/team")
    hooks.tell("failed", "it ended")
    ended.set()
    said = "slack-webhook/team did not take it in 0.1 s; 'failed' stands, and was not told"
    assert capsys.readouterr().err == f"warning: LONGLORA_HOOK_BLOCK: {said}\n"


def test_whatever_a_hook_meets_is_said_without_its_secrets(monkeypatch, capsys):
    from tasks import hooks

    monkeypatch.setenv("LONGLORA_HOOK_URL", "http://[T0K3N/")
    hooks.tell("promoted", "it is better")
    assert capsys.readouterr().err == (
        "warning: LONGLORA_HOOK_URL: failed (ValueError); 'promoted' stands, and was not told\n"
    )


def test_what_prefect_holds_back_is_sent_before_its_server_ends_though_no_flow_ran(monkeypatch):
    from prefect.events.worker import EventsWorker

    drained = []
    monkeypatch.delitem(sys.modules, "prefect.flows", raising=False)
    monkeypatch.setattr(EventsWorker, "drain_all", lambda timeout: drained.append(timeout))
    servers.flush()
    assert drained == [5]


def test_a_run_is_chosen_by_the_alias_of_its_model(empty, shop):
    from tasks import runs
    from tasks.promotion import RefusalError

    promote, client, where = empty
    with pytest.raises(ValueError, match="dummy has no champion yet"):
        runs.chosen(client, where, "champion")
    promote("good")
    with pytest.raises(RefusalError):
        promote("refused")
    found = {name: runs.chosen(client, where, name) for name in ("champion", "candidate")}
    keys = {name: run.data.tags["longlora.key"] for name, run in found.items()}
    assert keys == {"champion": shop[1]["good"], "candidate": shop[1]["refused"]}
    from flows.cli.reproduce import find

    client.set_registered_model_alias("dummy", "staging", alias(client, "candidate"))
    assert runs.chosen(client, where, "staging").data.tags["longlora.key"] == keys["candidate"]
    assert {name: find(where, name).key for name in keys} == keys


def test_a_run_is_chosen_by_its_id_or_its_beginning_however_many_are_newer(empty, shop, monkeypatch):
    from mlflow import MlflowClient

    from tasks import runs

    _, client, where = empty
    search = MlflowClient.search_runs

    def one_at_most(self: MlflowClient, *words: object, max_results: int = 1, **about: object) -> list:
        return search(self, *words, max_results=1, **about)

    monkeypatch.setattr(MlflowClient, "search_runs", one_at_most)
    for key in shop[1].values():
        run = runs.chosen(client, where, key)
        assert run.data.tags["longlora.key"] == key
        assert runs.chosen(client, where, run.info.run_id[:20]).info.run_id == run.info.run_id
    for none in ("zzz", "a'b", "%", "_" * 12):
        assert runs.matching(client, where, none) == []
