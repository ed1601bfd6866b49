"""Checks the parameters of a run before anything is computed, by the library that would compute it.

The check has a process of its own: a run's worktree has its own library, and what we import stays imported.
"""

import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.run_dir import RunDir
from tasks.workspace import Project, Snapshot, git


@contextmanager
def checked_meanwhile(run_dir: RunDir) -> Generator[None]:
    """Check the run's params.yaml in the background of the `with` block, if the run still has something to compute.

    Raises:
        ValueError: at the end of the block: all that is wrong for any of the run's stages, in one line.
    """
    if any(stage.status == "stale" for stage in run_dir.stages):
        with library_check(run_dir.folder, []):
            yield
    else:
        yield


def must_all_be_right(where: Project, snapshots: Sequence[Snapshot]) -> None:
    """Check the params.yaml of each of `snapshots` of the tree as it is, before any of them is run.

    Raises:
        ValueError: all that is wrong with the first one that is not right.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{snapshot.key}.yaml" for snapshot in snapshots]
        for file, snapshot in zip(files, snapshots, strict=True):
            file.write_text(git("show", f"{snapshot.commit}:params.yaml", cwd=where.tree) + "\n")
        if files:
            with library_check(where.tree, files):
                pass


def sections_must_be_right(where: Project, text: str) -> None:
    """Check the `text` of a params.yaml that is only planned with, section by section: whoever asks what a longer
    context takes need not say how it will be measured, nor have the data here.

    Raises:
        ValueError: all that is wrong with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(text)
        with library_check(where.tree, [file], each=True):
            pass


@contextmanager
def library_check(tree: Path, files: Sequence[Path], *, each: bool = False) -> Generator[None]:
    """Have the library of `tree` check the params `files`, or the tree's own if there are none, in the background of
    the `with` block.

    `each` checks their sections one by one. Which sections there are, the library reads in dvc.yaml; a project without
    stages of the library is not checked.
    """
    if "-m longlora.stages." not in (tree / "dvc.yaml").read_text():
        yield
        return
    own = tree / "longlora"
    # without its own check, an installed library's rules would be asked of other parameters
    if own.is_dir() and not (own / "check.py").is_file():
        older = "the library of this run is older than that"
        print(f"whether the parameters are right was not checked: {older}", flush=True)
        yield
        return
    command = [sys.executable, "-m", "longlora.check", *(["--each"] if each else []), *map(str, files)]
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as checking:
        try:
            yield
            notes, said = checking.communicate()
        finally:
            checking.kill()  # it has ended, unless something else was wrong meanwhile
    status = checking.returncode
    print(notes, end="", flush=True)
    said = (said.strip() or f"status {status}").splitlines()[-1].removeprefix("error: ")
    if status == 2:
        raise ValueError(said)
    if status:  # its stages check their own
        print(f"whether the parameters are right was not checked: {said}", flush=True)
