"""Bring a recorded run back, here or on another clone, and show that it is the same: output by output, by hash.

What ran is in git (the run's ref), what it made is on the DVC remote. Nothing is believed: the files are hashed anew.
"""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from flows.cli.terminal import console, plain_table
from flows.run_dir import checkpoint_home, stage_settings
from tasks import storage, supervise
from tasks.config import link
from tasks.locks import hold
from tasks.outputs import Compared, compared
from tasks.servers import is_local_tracking
from tasks.stages import DvcRepo
from tasks.tags import ALIASES, GIT, KEY, REMOTE
from tasks.workspace import Project, git, record_ref, worktree


@dataclass(frozen=True)
class Sought:
    """A run that is to be brought back."""

    key: str
    data: str
    """The address of the DVC remote that MLflow names; '' if it is not known."""


def reproduce(where: Project, wanted: str | None, *, remote: str | None, rerun: bool) -> None:
    """Bring run `wanted` back (its key or MLflow id, or their beginning; None: the last finished), and compare its outputs.

    Args:
        remote: the address of a DVC remote that has its data, if this clone's has not.
        rerun: compute every stage again, from nothing but the recorded files, and compare that.

    Raises:
        ValueError: the run, its record or its data is not reachable, or an output differs.
        StageError: a stage failed when computed again.
    """
    sought = find(where, wanted)
    key = sought.key
    with hold(where, key):
        dvc = bring_back(where, sought, remote)
        folder, record = dvc.folder, git("rev-parse", record_ref(key), cwd=where.root)
        varying = {out.path for stage in dvc.plan() for out in stage.outs if out.varies}
        if not rerun:
            judge(compared(where.root, record, folder, varying=set()), f"run {key} is back in {folder}")
            return
    with hold(where, again := f"{key}-again"):
        folder = compute_again(where, key, again)
        judge(compared(where.root, record, folder, varying=varying), f"run {key}, computed again in {folder}")
        git("worktree", "remove", "--force", str(folder), cwd=where.root)


def find(where: Project, wanted: str | None) -> Sought:
    """Which run is meant, its record in this clone."""
    data, published = "", ""
    if not is_local_tracking(where) or (where.state / "mlflow.db").exists():
        from tasks import runs, tracking

        client = tracking.connect()
        if wanted in (None, *ALIASES) or runs.matching(client, where, wanted):
            chosen = runs.chosen(client, where, wanted)
            runs.must_be_ours(chosen)
            tags = chosen.data.tags
            wanted, data = tags[KEY], tags.get(REMOTE, "")
            published = tags.get(GIT, "")
    if wanted is None:
        raise ValueError("no finished run yet: `longlora run`, or give the key of a run of another clone")
    if re.fullmatch("[0-9a-f]{13,}", wanted):  # longer than a key
        asked = storage.without_credentials(os.environ["MLFLOW_TRACKING_URI"])
        raise ValueError(
            f"run '{wanted}': MLflow at {asked} has no run of this id: set MLFLOW_TRACKING_URI to the server that has it, "
            "or name the run's key"
        )
    origin = ["origin"] if "origin" in git("remote", cwd=where.root).split() else []
    addresses = [os.environ.get("LONGLORA_GIT_REMOTE", ""), published, *origin]
    return Sought(storage.bring_record(where, wanted, list(dict.fromkeys(filter(None, addresses)))), data)


def bring_back(where: Project, sought: Sought, remote: str | None) -> DvcRepo:
    """The run's worktree, every output of its dvc.lock in it. Call it under the lock of its key."""
    snapshot = storage.recorded_snapshot(where, sought.key)
    folder = worktree(where, snapshot)
    git("checkout", record_ref(sought.key), "--", "dvc.lock", cwd=folder, stored=True)
    missing = ""
    addresses = list(dict.fromkeys([remote] if remote else ["", sought.data]))  # '': this clone's own
    for address in addresses:
        link(folder, to=where.tree, cache_home=where.root, remote=address)
        dvc = DvcRepo(folder, environment=stage_settings(checkpoint_home(where)))
        missing = dvc.bring()
        if not missing:
            return dvc
    asked = " nor ".join(storage.without_credentials(address) or "the DVC remote" for address in addresses)
    raise ValueError(
        f"run {sought.key}: neither the cache nor {asked} has {missing}: "
        "name the remote that has its data with --remote ADDRESS, and see that it is reachable"
    )


def compute_again(where: Project, key: str, again: str) -> Path:
    """A folder in which every stage of run `key` was run anew, without cache and without checkpoints."""
    folder = worktree(where, replace(storage.recorded_snapshot(where, key), key=again))
    supervise.take_over(folder)
    link(folder, to=where.tree, cache_home=where.root)
    with tempfile.TemporaryDirectory(dir=where.state) as checkpoints:
        dvc = DvcRepo(folder, environment=stage_settings(Path(checkpoints)), afresh=True)
        try:
            dvc.bring_sources()  # and nothing more: what stages make is not taken from the cache
            for name in dvc.names():
                dvc.bring_up_to_date(name)
        finally:
            dvc.close()
    return folder


def judge(outputs: list[Compared], what: str) -> None:
    """Show every hash; raise ValueError if one that ought to be equal is not."""
    table = plain_table("output", "stage", "recorded", "found", "")
    for out in outputs:
        mark = "[green]equal" if out.equal else "[yellow]times, may differ" if out.varies else "[red]differs"
        table.add_row(out.path, out.stage, out.recorded, out.found or "not there", mark)
    console().print(table)
    wrong = [out.path for out in outputs if not (out.equal or out.varies)]
    if wrong:
        differ = "differs" if len(wrong) == 1 else "differ"
        raise ValueError(f"{what}: {len(wrong)} of {len(outputs)} outputs {differ} from the record: {', '.join(wrong)}")
    equal = sum(out.equal for out in outputs)
    times = len(outputs) - equal
    rest = f", {times} {'holds' if times == 1 else 'hold'} times" if times else ""
    print(f"{what}: {equal} of {len(outputs)} outputs {'is' if equal == 1 else 'are'} equal by hash{rest}")
