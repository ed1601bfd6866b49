"""New data in a watched place: a run of its own for each state of the data, and none while nothing is new."""

import dummy
import pytest
from test_pipeline import flow_runs, mlflow_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def data(own, tmp_path):
    """A folder outside of git that training depends on."""
    folder = tmp_path / "documents"
    dummy.write(folder / "one.txt", "one")
    text = (own / "dvc.yaml").read_text()
    wanted = 'deps: [dummy/stage.py, "${models}/base"]\n    params: [train]'
    assert wanted in text
    (own / "dvc.yaml").write_text(text.replace(wanted, wanted.replace('base"]', f'base", {folder}]')))
    dummy.commit(own)
    return folder


def test_a_watched_place_runs_once_for_each_state_of_its_data(run_flow, own, data, environment, mlflow_uri):
    from prefect import State

    from tasks.stage_process import StageError

    first = run_flow(watch=str(data), scheduled=True)
    assert dummy.executions(own).count("train base") == 1
    nothing = run_flow(watch=str(data), scheduled=True, return_state=True)
    assert isinstance(nothing, State)
    assert (nothing.name, nothing.type.value) == ("Unchanged", "COMPLETED")
    assert len(flow_runs(environment["PREFECT_API_URL"], first)) == 1

    (data / "two.txt").write_text("two")
    with pytest.raises(StageError):  # with other overrides nothing is remembered of it; and a failure is not remembered
        run_flow(watch=str(data), overrides=["train.fail=true"])
    with pytest.raises(StageError):
        run_flow(watch=str(data), overrides=["train.fail=true"])
    second = run_flow(watch=str(data), scheduled=True)
    assert second != first
    assert [len(mlflow_runs(mlflow_uri, key)) for key in (first, second)] == [1, 1]
    assert dummy.executions(own).count("train base") == 4

    (data / "two.txt").unlink()  # the first state again: known, and not computed again
    assert run_flow(watch=str(data)) == first
    assert dummy.executions(own).count("train base") == 4


def test_a_run_whose_promotion_broke_off_is_tried_again_and_one_that_was_refused_is_not(
    run_flow, own, data, monkeypatch
):
    from flows import promote
    from tasks.promotion import RefusalError

    for error, executed in ((ConnectionError, 1), (RefusalError, 1)):

        def broken(key: str, error: type[Exception] = error) -> str:
            raise error("no")

        monkeypatch.setattr(promote, "promote", broken)
        with pytest.raises(error):
            run_flow(watch=str(data), promote=True)
        assert dummy.executions(own).count("train base") == executed
    assert run_flow(watch=str(data), promote=True, return_state=True).name == "Unchanged"


@pytest.mark.parametrize("worse", [None, 0.1])
def test_a_look_that_finds_another_at_work_or_in_its_promotion_leaves_it_alone(run_flow, own, data, monkeypatch, worse):
    from flows import decay, promote

    asked = {"watch": None if worse else str(data), "if_worse": worse, "promote": True}
    during: list[str] = []

    def look(key: str) -> str:
        assert during[-1:] != ["asked"], "a promotion within a promotion"
        during.append("asked")
        during[-1] = run_flow(**asked, return_state=True).name
        with pytest.raises(ValueError, match="unknown key"):  # with other overrides it is another look
            run_flow(**asked, overrides=["other=1"])
        return "promoted"

    monkeypatch.setattr(promote, "promote", look)
    monkeypatch.setattr(decay, "still_good", lambda run_dir, by: "")
    first = run_flow(**asked)
    assert during == ["Busy"]
    assert dummy.executions(own).count("train base") == 1
    after = run_flow(**asked, return_state=True)
    assert (after.name == "Unchanged") if not worse else (during == ["Busy", "Busy"] and after.result() == first)


def test_what_changes_under_a_run_is_not_taken_for_what_it_ran_on(own, data):
    from tasks.watching import watched
    from tasks.workspace import project

    where = project(own)
    seen = watched(where, str(data), recipe=None, overrides=[])
    (data / "late.txt").write_text("late")
    seen.remember()
    assert watched(where, str(data), recipe=None, overrides=[]).changed
    watched(where, str(data), recipe=None, overrides=[]).remember()
    assert not watched(where, str(data), recipe=None, overrides=[]).changed
    assert watched(where, str(data), recipe="big", overrides=[]).changed


def test_a_run_of_a_deployment_whose_earlier_one_is_at_work_or_in_its_promotion_leaves_it_alone(
    run_flow, own, monkeypatch
):
    from flows import pipeline, promote

    during: list[str] = []

    def due(key: str) -> str:
        assert not during, "a promotion within a promotion"
        during.append("asked")
        during[-1] = run_flow(scheduled=True, promote=True, return_state=True).name
        with monkeypatch.context() as other:
            other.setattr(pipeline, "own_deployment", lambda: "another")
            during.append(run_flow(scheduled=True, return_state=True).name)
        during.append(run_flow(return_state=True).name)  # a person's
        return "promoted"

    monkeypatch.setattr(promote, "promote", due)
    monkeypatch.setattr(pipeline, "own_deployment", lambda: "ours")
    run_flow(scheduled=True, promote=True)
    assert during == ["Busy", "Completed", "Completed"]


def test_who_asks_a_deployment_for_another_training_need_not_wait_for_its_turn(monkeypatch):
    """The run that is on leaves something else behind, so a later one would not see it."""
    from flows import pipeline

    monkeypatch.setattr(pipeline, "own_deployment", lambda: "nightly")

    def turn(*overrides: str, scheduled: bool = True) -> str | None:
        return pipeline.turn_of(None, recipe=None, overrides=[*overrides], if_worse=None, scheduled=scheduled)

    assert turn() == turn() != turn("fit.steps=9")
    assert turn(scheduled=False) is None
