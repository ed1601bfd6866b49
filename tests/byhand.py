"""Runs of the dummy project without Prefect: stages by DVC, record in git, tags in MLflow; a second or two each."""

from pathlib import Path

from tasks.config import link
from tasks.stages import DvcRepo
from tasks.storage import Finished, kept_ref, note, record
from tasks.tags import RECORD, REF, VERDICT
from tasks.workspace import project, snapshot, worktree


def run(folder: Path, *overrides: str, remote: str = "", tracked: str = "") -> str:
    """The key of a finished run. `remote`: where its data is pushed; `tracked`: the MLflow experiment that is told of it."""
    where = project(folder)
    state = snapshot(where, overrides=list(overrides))
    work = worktree(where, state)
    link(work, to=where.tree, cache_home=where.root, remote=remote)
    dvc = DvcRepo(work, environment={"LONGLORA_CHECKPOINTS": str(where.state / "checkpoints")})
    for stage in dvc.plan():
        dvc.bring_up_to_date(stage.name)
    dvc.close()
    dvc.push()
    commit = record(where, state, work)
    run_id = ""
    if tracked:
        from tasks import tracking

        tracker = tracking.Tracker(tracking.connect(), where, state, experiment=tracked, folder=work)
        for stage in dvc.plan():
            tracker.stage(stage.name, dvc.outs(stage))
        tracker.tag({RECORD: commit, REF: kept_ref(commit), VERDICT: "metrics/verdict.json"})
        tracker.finish("FINISHED")
        run_id = tracker.run_id
    note(where, state.key, Finished(commit, run_id, ""))
    return state.key
