"""The process of one stage: it imports DVC, waits to be told a stage's name, and does what `dvc repro --single-item NAME` does."""

import gc
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.stage.cache import StageCache, _can_hash  # pyright: ignore[reportPrivateUsage], `known` asks what `restore` asks
from dvc.stage.exceptions import StageCmdFailedError

CAUSE = "error: "
AFRESH = "--afresh"  # run the stage even if its outputs are known, and leave the cache as it is


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


def reproduce_one() -> int:
    """Read the name, run the stage, end with its status."""
    logging.getLogger("dvc").setLevel(logging.ERROR)  # its advice (git add dvc.lock) is not for a run
    repo = Repo(_wait_for_lock=True)  # it reads neither dvc.yaml nor dvc.lock yet
    repo.stage_cache = RunCache(repo)
    name = sys.stdin.readline().strip()
    if not name:
        return 0
    how = {"force": True, "no_commit": True} if AFRESH in sys.argv else {}
    try:
        drop_cut_off_locks(repo)
        # a function that is bound to `repo`, which the type of its decorator does not say
        repo.reproduce(name, single_item=True, run_env={"PYTHONPATH": os.getcwd()}, **how)  # pyright: ignore[reportArgumentType]
    except DvcException as error:
        reason = error.__cause__ or error
        if isinstance(reason, StageCmdFailedError):
            status = re.search(r"exited with (\d+)$", str(reason))
            return min(int(status[1]), 255) if status else 1
        print(f"{CAUSE}{reason}", flush=True)
        return 1
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
