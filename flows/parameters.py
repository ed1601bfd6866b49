"""Checks the parameters of a run before anything is computed, by the library that would compute it.

The check has a process of its own: a run's worktree has its own library, and what we import stays imported.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flows.run_dir import RunDir
from tasks.workspace import Project, Snapshot, git


def must_be_right(run_dir: RunDir) -> None:
    """Refuse a run that still computes something, if params.yaml is wrong for any of its stages.

    Raises:
        ValueError: all that is wrong, in one line.
    """
    if any(stage.status == "stale" for stage in run_dir.stages):
        ask(run_dir.folder, [])


def must_all_be_right(where: Project, snapshots: Sequence[Snapshot]) -> None:
    """The same for snapshots of the tree as it is, before any of them is a run.

    Raises:
        ValueError: all that is wrong with the first that is.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{snapshot.key}.yaml" for snapshot in snapshots]
        for file, snapshot in zip(files, snapshots, strict=True):
            file.write_text(git("show", f"{snapshot.commit}:params.yaml", cwd=where.tree) + "\n")
        if files:
            ask(where.tree, files)


def ask(tree: Path, files: Sequence[Path]) -> None:
    """Have the library of `tree` check the params `files`, or without any the tree's own. It reads in dvc.yaml which stages there
    are; a project without stages of the library is not checked."""
    if "-m longlora.stages." not in (tree / "dvc.yaml").read_text():
        return
    own = tree / "longlora"
    # without its own check, an installed library's rules would be asked of other parameters
    if own.is_dir() and not (own / "check.py").is_file():
        older = "the library of this run is older than that"
        print(f"whether the parameters are right was not checked: {older}", flush=True)
        return
    command = [sys.executable, "-m", "longlora.check", *map(str, files)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1].removeprefix("error: ")
    if done.returncode == 2:
        raise ValueError(said)
    if done.returncode:  # its stages check their own
        print(f"whether the parameters are right was not checked: {said}", flush=True)
