"""Data that parameters name by a path: another hash, another run, and DVC computes what stands on it anew."""

import shutil
from pathlib import Path

import byhand
import dummy
import pytest
import yaml

from tasks import workspace
from tasks.config import link
from tasks.hashes import hash_of
from tasks.sources import hashed
from tasks.stage_process import ParameterError
from tasks.stages import DvcRepo
from tasks.workspace import project, snapshot


@pytest.fixture
def reading(folder: Path, tmp_path: Path) -> Path:
    """The project, its training on the documents of a folder outside of git, named in params.yaml."""
    dummy.write(tmp_path / "documents" / "one.txt", "one")
    text = (folder / "params.yaml").read_text().replace("rank: 8,", f"rank: 8, data: {tmp_path / 'documents'},")
    dummy.write(folder / "params.yaml", text)
    text = (folder / "dvc.yaml").read_text().replace("params: [train]", "params: [train, {sources.yaml: [train]}]")
    dummy.write(folder / "dvc.yaml", text)
    dummy.write(folder / "sources.yaml", "train: {}\n")
    dummy.commit(folder)
    return folder


@pytest.mark.slow
def test_edited_documents_are_another_run_and_train_anew_and_a_clone_without_them_has_the_run(reading, tmp_path):
    from flows.cli.reproduce import Sought, bring_back

    first = byhand.run(reading)
    assert byhand.run(reading) == first
    dummy.write(tmp_path / "documents" / "one.txt", "another")
    second = byhand.run(reading)
    assert second != first
    assert dummy.executions(reading).count("train base") == 2 and dummy.executions(reading).count("fetch base") == 1
    dummy.write(tmp_path / "documents" / "one.txt", "one")
    assert snapshot(project(reading)).key == first
    shutil.rmtree(tmp_path / "documents")
    for key in (first, second):
        dvc = bring_back(project(reading), Sought(key, ""), None)
        assert {stage.status for stage in dvc.plan()} == {"unchanged"}


def test_a_snapshot_has_the_hashes_and_is_the_checkout_itself_where_these_are_committed(reading, tmp_path):
    documents = tmp_path / "documents"
    state = snapshot(project(reading))
    assert not state.dirty
    text = dummy.git(reading, "show", f"{state.commit}:sources.yaml")
    assert yaml.safe_load(text) == {"train": {str(documents): hash_of(documents)}}
    dummy.write(reading / "sources.yaml", f"# as it is\n{text}\n")
    dummy.commit(reading)
    assert snapshot(project(reading)).commit == dummy.git(reading, "rev-parse", "HEAD")
    dummy.write(documents / "two.txt", "two")
    assert snapshot(project(reading)).commit != dummy.git(reading, "rev-parse", "HEAD")


def test_of_documents_that_were_edited_under_the_stage_that_reads_them_nothing_is_recorded(reading, tmp_path):
    documents = tmp_path / "documents" / "one.txt"
    edit = f"""
    pathlib.Path({str(documents)!r}).write_text("another")
    tuned.mkdir()"""
    dummy.write(reading / "dummy/stage.py", dummy.STAGE.lstrip().replace("\n    tuned.mkdir()", edit))
    folder = workspace.worktree(project(reading), snapshot(project(reading)))
    link(folder, to=reading, cache_home=reading)
    dvc = DvcRepo(folder, environment={})
    dvc.bring_up_to_date("fetch")
    with pytest.raises(
        ParameterError, match=rf"^stage 'train': {documents.parent} was changed while the run was at work"
    ):
        dvc.bring_up_to_date("train")
    assert dvc.settle("train") == "stale"
    assert "train" not in yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    documents.write_text("one")
    (folder / "dummy/stage.py").write_text(dummy.STAGE.lstrip())
    dvc.bring_up_to_date("train")
    assert "train" in yaml.safe_load((folder / "dvc.lock").read_text())["stages"]


def test_parameters_without_a_section_name_no_path(folder):
    assert hashed("a: {}\n", "", folder) == "a: {}\n"


def test_what_counts_as_a_path(folder, tmp_path):
    dummy.write(folder / "texts" / "a.txt", "a")
    dummy.write(folder / "tracked.dvc", f"outs:\n- md5: {'a' * 32}\n  path: tracked\n  hash: md5\n")
    dummy.write(folder / "pulled.dvc", f"outs:\n- md5: {'b' * 32}\n  path: pulled\n  hash: md5\n")
    dummy.write(folder / "pulled", "edited")
    dummy.write(folder / "elsewhere.dvc", "outs:\n- etag: x\n  path: elsewhere\n")
    tracked, none = (
        ["tracked", str(folder / "pulled")],
        ["elsewhere", "", ".", str(tmp_path), "~nobody/x", "no such", 1, None],
    )
    params = yaml.safe_dump({"a": {"x": [{"name": "texts"}, *tracked, *none]}, "b": "texts"})
    found = yaml.safe_load(hashed("a: {}\n", params, folder))
    pulled = folder / "pulled"
    assert found == {"a": {"texts": hash_of(folder / "texts"), "tracked": "a" * 32, str(pulled): hash_of(pulled)}}
