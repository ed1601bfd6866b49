"""The process of one stage: it imports DVC, waits to be told a stage's name, and does what `dvc repro --single-item NAME` does."""

import gc
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.stage.cache import StageCache, _can_hash  # pyright: ignore[reportPrivateUsage], `known` asks what `restore` asks
from dvc.stage.exceptions import StageCmdFailedError
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import dumps_yaml

from tasks.sources import SOURCES, must_be_as_named

CAUSE = "error: "
AFRESH = "--afresh"  # run the stage even if its outputs are known, and leave the cache as it is
LOCK = re.compile(r"(#.*\n)*schema: '2\.0'\nstages:\n(  [\w.@+'-]+:\n(    .*\n)+)*")  # a dvc.lock as DVC writes it


class RunCache(StageCache):
    """DVC's run cache, where a stage's folder that a kill or a full disk left empty counts as none: DVC's own fails on it.

    An object that is deleted while outputs are put in place is an error: DVC's own goes on, and what is there counts as all of it.
    """

    def known(self, stage: Any) -> Any | None:
        """A stage that has, in the cache, what was computed from the inputs that `stage` has saved; None if there is none.

        DVC's `restore` looks it up and puts it in place in one go: who has to make room between, would look twice.
        """
        cache = self._load(stage) if _can_hash(stage) else None
        made = self._create_stage(cache, wdir=stage.wdir) if cache else None
        return made if made and made.outs_cached() else None

    def _load_cache(self, key: str, value: str | None) -> Any:
        return super()._load_cache(key, value) if value else None

    def _create_stage(self, cache: Any, wdir: str | None = None) -> Any:
        made: Any = super()._create_stage(cache, wdir)
        checkout = made.checkout
        made.checkout = lambda: must_be_whole(checkout())
        return made


def must_be_whole(done: dict[str, list[str]]) -> None:
    """Check what a stage's checkout says it did.

    Raises:
        DvcException: an output is not in place.
    """
    if missed := done.get("failed"):
        raise DvcException(
            f"{os.path.relpath(missed[0])} went from the cache meanwhile: the same command computes it anew"
        )


def reproduced(stage: Any, **options: Any) -> Any:
    """DVC's own `reproduce` of the stage, with two changes: dvc.lock is written our way, and nothing is recorded if data that the
    stage reads was changed while it ran."""
    save = stage.save

    def save_if_as_named(**how: Any) -> None:
        must_be_as_named(sections_of(stage), Path.cwd())
        save(**how)

    stage.save = save_if_as_named
    done = stage.reproduce(**options)
    if done:
        write_lock([stage])
    return done


def sections_of(stage: Any) -> list[str]:
    """The sections of sources.yaml that `stage` has among its parameters."""
    found = [dep for dep in stage.deps if isinstance(dep, ParamsDependency) and Path(dep.fs_path).name == SOURCES]
    return [name for dep in found for name in dep.params]


def write_lock(stages: list[Any]) -> None:
    """Put `stages` of one dvc.yaml into its dvc.lock, which becomes, in one step, what DVC would make of it, byte for byte.

    DVC reads and writes all of it, comments too, by a parser in Python: .3 s for each of the demo's twenty stages.
    """
    repo, file = stages[0].repo, Path(stages[0].path).with_suffix(".lock")
    text = file.read_text(encoding="utf-8") if file.exists() else "schema: '2.0'\nstages:\n"
    new = dumps_yaml({"schema": "2.0", "stages": {stage.name: to_lockfile(stage)[stage.name] for stage in stages}})
    if not (LOCK.fullmatch(text) and LOCK.fullmatch(new)):  # somebody else's hand
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
        return
    head, *known = entries(text)
    both = {entry.partition("\n")[0]: entry for entry in [*known, *entries(new)[1:]]}
    scratch = Path(repo.tmp_dir, "dvc.lock")
    scratch.write_text(head + "".join(both.values()), encoding="utf-8")
    scratch.replace(file)
    repo.scm_context.track_file(os.path.relpath(file))


def entries(lock: str) -> list[str]:
    """What stands before the first stage of a dvc.lock's text, and each stage's lines."""
    return re.split(r"(?m)^(?=  \S)", lock)


def reproduce_one() -> int:
    """Read the name, run the stage, end with its status."""
    logging.getLogger("dvc").setLevel(logging.ERROR)  # its advice (git add dvc.lock) is not for a run
    repo = Repo(_wait_for_lock=True)  # it reads neither dvc.yaml nor dvc.lock yet
    repo.stage_cache = RunCache(repo)
    name = sys.stdin.readline().strip()
    if not name:
        return 0
    how: dict[str, Any] = {"force": True, "no_commit": True} if AFRESH in sys.argv else {}
    how |= {"repro_fn": reproduced, "run_env": {"PYTHONPATH": os.getcwd()}}
    try:
        drop_cut_off_locks(repo)
        # a function that is bound to `repo`, which the type of its decorator does not say
        repo.reproduce(name, single_item=True, **how)  # pyright: ignore[reportArgumentType]
    except DvcException as error:
        reason = error.__cause__ or error
        if isinstance(reason, StageCmdFailedError):
            status = re.search(r"exited with (\d+)$", str(reason))
            return min(int(status[1]), 255) if status else 1
        print(f"{CAUSE}{reason}", flush=True)
        return 2 if isinstance(reason, ValueError) else 1  # of data that was changed another try has no other
    return 0


def drop_cut_off_locks(repo: Repo) -> None:
    """Remove DVC's file of who reads and writes what, if a kill cut it off: DVC writes it in place, and then refuses to read it.

    Who wrote it is gone, and with it what it had locked. DVC's own guard is held, so no one is writing.
    """
    assert repo.tmp_dir is not None
    file = Path(repo.tmp_dir, RWLOCK_FILE)
    if not file.exists():
        return
    with make_lock(str(Path(repo.tmp_dir, RWLOCK_LOCK)), tmp_dir=repo.tmp_dir):
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError:
            file.unlink()


if __name__ == "__main__":
    status = reproduce_one()
    gc.freeze()  # or the interpreter's end looks through all that was imported for what could be freed
    sys.exit(status)
