"""A project that was moved: its champion is its own there, and MLflow keeps the files of its runs there."""

from pathlib import Path

import byhand
import pytest

from tasks.storage import ours
from tasks.workspace import project

pytestmark = pytest.mark.slow


@pytest.fixture
def moved(folder, tmp_path, monkeypatch) -> tuple[Path, str]:
    """A project that made a champion, and then was moved; and the champion's key."""
    from tasks import promotion, runs, tracking

    (folder / ".longlora").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/.longlora/mlflow.db")
    key = byhand.run(folder, "train.rank=5", tracked="dummy")
    client, where = tracking.connect(), project(folder)
    promotion.promote(client, where, runs.chosen(client, where, key))
    home = folder.rename(tmp_path / "moved")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/.longlora/mlflow.db")
    return home, key


def test_the_champion_of_a_moved_project_is_exported_kept_and_not_registered_again(moved, tmp_path):
    from tasks import leftovers, promotion, registry, runs, tracking
    from tasks.export import export

    home, key = moved
    client, where = tracking.connect(), project(home)
    export(client, where, tmp_path / "out", model="champion")
    assert (tmp_path / "out" / "weights").read_text() == "b" * 5
    versions = ours(where, registry.commits(client))
    assert not any(each.kind == "worktree" for each in leftovers.leftovers(where, keep=0, versions=versions))
    run = runs.chosen(client, where, key)
    already = "dummy version 1 is the champion already"
    assert promotion.nothing_to_do(client, where, run) == promotion.promote(client, where, run) == already
    assert len(client.search_model_versions("name = 'dummy'")) == 1


def test_a_champion_whose_published_address_is_gone_is_read_from_the_clone_that_has_it(moved, tmp_path):
    from tasks import runs, tracking
    from tasks.artifacts import DvcArtifactRepository
    from tasks.tags import GIT

    home, key = moved
    client, where = tracking.connect(), project(home)
    run = runs.chosen(client, where, key)
    client.set_tag(run.info.run_id, GIT, str(tmp_path / "nowhere.git"))
    assert "models/tuned" in runs.outputs_of(where, runs.chosen(client, where, key))
    assert DvcArtifactRepository(runs.address_and_key(client, where, key)[0]).files.read_text("dvc.lock")


def test_files_of_runs_are_where_the_project_is(moved, folder):
    from tasks import runs, tracking

    home, key = moved
    client, where = tracking.connect(), project(home)
    other = byhand.run(home, "train.rank=6", tracked="dummy")
    for each in (key, other):
        run = runs.chosen(client, where, each)
        assert run.info.artifact_uri == f"{home.as_uri()}/.longlora/mlartifacts/{run.info.run_id}/artifacts"
        assert {"params.yaml", "dvc.lock"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    assert not folder.exists()


def test_files_that_another_clone_keeps_for_our_database_stay_where_they_are(moved, tmp_path):
    from tasks import tracking

    home, _ = moved
    client, where = tracking.connect(), project(home)
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    theirs = (tmp_path / "clone" / ".longlora" / "mlartifacts").as_uri()
    made = client.create_experiment("theirs", artifact_location=theirs)
    assert tracking.experiment_id(client, where, "theirs") == made
    assert client.get_experiment(made).artifact_location == theirs
