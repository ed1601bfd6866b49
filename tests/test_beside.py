"""A recorded model beside a run's own: brought by hash, measured like it, compared on the same data; and watched."""

import shutil
from pathlib import Path

import dummy
import pytest
from test_pipeline import flow_runs, key_of, mlflow_runs

from tasks.workspace import project, snapshot


@pytest.fixture
def own(folder: Path) -> Path:
    """A project whose model has a name of its own, and so a registry entry of its own; its champion is of rank 4."""
    path = folder / "dvc.yaml"
    path.write_text(path.read_text().replace("\nartifacts:\n  dummy:", f"\nartifacts:\n  {folder.parent.name[:40]}:"))
    dummy.commit(folder)
    return folder


def other_data(folder: Path) -> None:
    """Another base, and so other data: letters count double."""
    path = folder / "dummy" / "stage.py"
    path.write_text(path.read_text().replace('write_text("b")', 'write_text("cc")'))
    dummy.commit(folder)


def scores(uri: str, key: str) -> dict[str, float]:
    (run,) = mlflow_runs(uri, key)
    return {name: value for name, value in run.data.metrics.items() if name.startswith("score/")}


def test_a_champion_of_other_data_is_measured_beside_and_only_then_compared(own, environment):
    def longlora(*words: str) -> tuple[int, str]:
        done = dummy.longlora(own, *words, env=environment)
        return done.returncode, done.stdout + done.stderr

    def works(*words: str) -> None:
        status, said = longlora(*words)
        assert status == 0, said

    assert longlora("run", "--beside", "champion")[1].startswith("error: ")
    works("run", "--set", "train.rank=4", "--promote")
    other_data(own)
    works("run", "--set", "train.rank=3")
    status, said = longlora("promote")
    assert status == 1
    assert "models/base is not what champion version 1 was measured on" in said
    assert "`longlora run --beside champion` measures both" in said

    # rank 4 of the first data weighs 4, rank 1 of the other 2 and rank 3 of it 6
    works("run", "--set", "train.rank=1", "--set", "gate.least=0.1", "--beside", "champion")
    status, said = longlora("promote")
    assert status == 1
    assert "better: score/tuned at 4 is 0.5, and must be higher than 1 of champion version 1" in said
    works("run", "--set", "train.rank=3", "--beside", "champion")
    status, said = longlora("promote")
    assert (status, "is champion" in said) == (0, True), said


def test_a_rival_is_part_of_the_run_and_comes_back_from_the_remote(own, environment, mlflow_uri):
    assert dummy.longlora(own, "run", "--set", "train.rank=4", env=environment).returncode == 0
    first = key_of(own, "train.rank=4")
    label = f"run-{first}"
    done = dummy.longlora(own, "run", "--beside", first[:6], env=environment)
    assert done.returncode == 0, done.stderr
    folder = next(p for p in (own / ".longlora/worktrees").iterdir() if (p / f"rivals/{label}.dvc").exists())
    assert scores(mlflow_uri, folder.name) == {"score/base": 0.25, "score/tuned": 2.0, f"score/{label}": 1.0}
    assert dummy.longlora(own, "run", "--beside", first[:6], env=environment).stdout.count("unchanged") >= 6

    shutil.rmtree(folder)  # all but what git and the remote have
    shutil.rmtree(own / ".dvc/cache")
    done = dummy.longlora(own, "run", "--beside", first[:6], env=environment)
    assert done.returncode == 0, done.stderr
    assert (folder / f"rivals/{label}/weights").read_text() == "bbbb"

    shutil.rmtree(folder / f"rivals/{label}")
    shutil.rmtree(own / ".dvc/cache")
    shutil.rmtree(own / ".longlora/remote")
    done = dummy.longlora(own, "run", "--beside", first[:6], env=environment)
    assert done.returncode == 1
    assert f"rivals/{label}.dvc: its data is neither in the cache nor on a remote" in done.stderr


@pytest.mark.parametrize(("by", "name"), [(0.8, "StillGood"), (0.3, "Completed")])
def test_a_watched_champion_is_measured_on_the_data_as_it_is_and_trained_anew_if_it_got_worse(
    own, environment, run_flow, by, name
):
    assert dummy.longlora(own, "run", "--set", "train.rank=4", "--promote", env=environment).returncode == 0
    # the score counts half of what it did: at 4 the champion has 0.5 now, and had 1
    path = own / "dummy" / "stage.py"
    path.write_text(path.read_text().replace("size / n", "size / n / 2"))
    dummy.commit(own)
    before = len(dummy.executions(own))
    state = run_flow(beside="champion", if_worse=by, return_state=True)
    ran = [line.split()[0] for line in dummy.executions(own)[before:]]
    assert state.name == name
    assert ran[0] == "score"
    assert (ran == ["score"]) == (name == "StillGood")
    if name == "StillGood":
        assert state.message == "score/champion at 4 is 0.5, and was 1 when it was promoted"
    assert "train" in ran or name == "StillGood"
    (flow,) = flow_runs(environment["PREFECT_API_URL"], snapshot_key(own))
    assert flow["state"]["name"] == name


def snapshot_key(folder: Path) -> str:
    from tasks import tracking
    from tasks.beside import addition

    where = project(folder)
    return snapshot(where, additions=[addition(tracking.connect(), where, "champion")]).key


def test_new_data_in_a_watched_place_is_promoted_on_where_the_champion_stands_beside(
    run_flow, own, tmp_path, monkeypatch
):
    from flows import deploy
    from tasks.promotion import RefusalError

    data = tmp_path / "documents"
    dummy.write(data / "one.txt", "one")
    for name, old, new in (
        ("dvc.yaml", "deps: [dummy/stage.py]", f"deps: [dummy/stage.py, {data}]"),
        ("dummy/stage.py", 'write_text("b")', f'write_text("b" * len(os.listdir("{data}")))'),
    ):
        text = (own / name).read_text()
        assert old in text
        dummy.write(own / name, text.replace(old, new, 1))
    (own / "prefect.yaml").write_text((Path(__file__).parent.parent / "prefect.yaml").read_text())
    dummy.commit(own)
    first = run_flow(watch=str(data), promote=True)
    (data / "two.txt").write_text("two")
    with pytest.raises(RefusalError, match="models/base is not what champion version 1 was measured on"):
        run_flow(watch=str(data), promote=True, overrides=["train.rank=9"])

    asked: dict = {}
    monkeypatch.setattr(deploy, "ask_prefect", lambda where, address, entry: asked.update(entry["parameters"]))
    words = {"cron": None, "interval": 300, "timezone": "UTC", "recipe": None, "overrides": []}
    deploy.deploy(project(own), name="new", **words, promote=True, watch=str(data), beside="champion")
    assert run_flow(**asked) != first
    assert run_flow(**asked, return_state=True).name == "Unchanged"
