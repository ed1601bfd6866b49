"""A sweep: every combination once, a failure among them does not stop the rest, nothing begins on bad input."""

from pathlib import Path

import dummy
import pytest
from test_pipeline import mlflow_runs

from tasks.workspace import project


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("a.b=1,2", ["a.b=1", "a.b=2"]),
        ("a.b=[4,2],[8]", ["a.b=[4,2]", "a.b=[8]"]),
        ("a.b='x,y', z", ["a.b='x,y'", "a.b=z"]),
        ("a.b={c: 1, d: 2},{c: 3}", ["a.b={c: 1, d: 2}", "a.b={c: 3}"]),
        ("a.b=2.0e-5", ["a.b=2.0e-5"]),
    ],
)
def test_values_are_parted_by_commas_outside_of_brackets_and_quotes(axis, values):
    from flows.cli.sweep import axis_values

    assert axis_values(axis) == values


def test_the_points_are_the_product_with_the_keys_that_single_runs_have(folder):
    from flows.cli.sweep import name_of, points
    from tasks.workspace import snapshot

    where = project(folder)
    found = points(where, ["train.rank=5,6", "gate.least=1,2,3"], recipe="big", overrides=["train.steps=2"])
    assert [point.values for point in found] == [
        (f"train.rank={rank}", f"gate.least={least}") for rank in (5, 6) for least in (1, 2, 3)
    ]
    single = snapshot(where, recipe="big", overrides=["gate.least=2", "train.steps=2", "train.rank=6"])
    assert found[4].state.key == single.key
    assert name_of(found) == name_of(found[::-1]) != name_of(found[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.rnk=1,2"], "error: unknown key 'train.rnk'; did you mean 'rank'?"),
        (["train.rank=1,many"], "error: train.rank = 'many': must be a number, as in train.rank = 8"),
        (["train.rank=1,"], "error: sweep 'train.rank=1,': a value is empty"),
        (["train.rank"], "error: sweep 'train.rank': must be key=value,value, such as adapter.rank=8,16"),
        (["train.rank=1,1"], "error: train.rank=1 and train.rank=1 are the same run: give each value once"),
        (["train.rank=1", "train.rank=2"], "error: train.rank: is given twice; name it once, with all its values"),
        (["train.rank=1,2", "--set", "train.rank=3"], "error: train.rank: is given twice"),
        (["train.rank=1,2", "--recipe", "bgi"], "error: no recipe 'bgi'; did you mean 'big'?"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_begins(folder, arguments, said):
    done = dummy.longlora(folder, "sweep", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert not (folder / ".longlora" / "worktrees").exists()


def test_a_run_that_dvc_or_mlflow_ends_is_a_failed_run_and_not_the_end_of_the_sweep(folder, monkeypatch):
    from dvc.exceptions import DvcException
    from mlflow.exceptions import MlflowException

    from flows.cli import sweep

    where = project(folder)
    monkeypatch.setattr(sweep, "open_run_dir", lambda where, state: None)
    monkeypatch.setattr(sweep, "is_finished", lambda run_dir: False)
    for point, error in zip(
        sweep.points(where, ["train.rank=5,6"], recipe=None, overrides=[]),
        [DvcException("no such\nremote"), MlflowException("busy")],
        strict=True,
    ):

        def run(state, error=error):
            raise error

        assert sweep.attempt(where, point, run) == " ".join(str(error).split())


@pytest.mark.slow
def test_a_sweep_runs_all_though_one_fails_and_ends_as_one_table(folder: Path, prefect_url):
    from mlflow import MlflowClient

    env = {"PREFECT_API_URL": prefect_url}
    command = ["sweep", "train.rank=5,7", "train.fail=false,true", "--set", "gate.least=1.5"]
    done = dummy.longlora(folder, *command, env=env)
    assert done.returncode == 1
    assert done.stderr == "error: 2 of 4 runs failed; the same command again runs them again\n"
    rows = [line.split() for line in done.stdout.split("score/tuned")[1].splitlines()[1:5]]
    assert [row[1:] for row in rows[::2]] == [
        ["5", "false", "refused", "1.25", "at", "4"],
        ["7", "false", "passed", "1.75", "at", "4", "best"],
    ]
    failed = ["true", "failed", "stage", "'train':", "train.fail", "is", "set"]
    assert [row[1:] for row in rows[1::2]] == [[rank, *failed] for rank in "57"]

    uri, where = f"sqlite:///{folder}/.longlora/mlflow.db", done.stdout.rpartition("in MLflow: ")[2].strip()
    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    together = client.search_runs(experiments, where)
    assert {run.data.tags["longlora.key"] for run in together} == {row[0] for row in rows}
    assert sorted(run.info.status for run in together) == ["FAILED"] * 2 + ["FINISHED"] * 2

    before = dummy.executions(folder)
    again = dummy.longlora(
        folder, "sweep", "train.rank=7,5", "--set", "gate.least=1.5", env=env
    )  # part of the other: computed already
    assert (again.returncode, again.stderr) == (0, "")
    assert dummy.executions(folder) == before
    (run,) = mlflow_runs(uri, rows[2][0])
    assert len(run.data.tags["longlora.sweeps"].split()) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("run_flow")
def test_every_run_is_of_the_files_as_they_were_when_the_sweep_began(own, mlflow_uri, monkeypatch):
    from flows.cli import sweep

    attempt, before = sweep.attempt, {}

    def edited(where, point, run):
        before[point.state.key] = point.state.commit
        dummy.write(own / "params.yaml", dummy.PARAMS.replace("steps: 3", f"steps: {3 + len(before)}"))
        dummy.write(own / "recipes" / "big.yaml", "train: {rank: 1}\n")
        return attempt(where, point, run)

    monkeypatch.setattr(sweep, "attempt", edited)
    results = sweep.sweep(project(own), ["gate.least=1,2"], recipe="big", overrides=[])
    assert [(each.failure, each.verdict) for each in results] == [("", "passed"), ("", "passed")]
    assert len(before) == 2
    for key, commit in before.items():
        assert dummy.git(own, "rev-parse", f"refs/longlora/runs/{key}~") == commit
        (run,) = mlflow_runs(mlflow_uri, key)
        assert (run.data.params["train.rank"], run.data.params["train.steps"]) == ("16", "3")
        assert run.data.tags["longlora.recipe"] == "big"
