"""The process of one stage: it imports DVC, waits to be told a stage's name, and does what `dvc repro --single-item NAME` does."""

import logging
import os
import re
import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

CAUSE = "error: "
AFRESH = "--afresh"  # run the stage even if its outputs are known, and leave the cache as it is


def reproduce_one() -> int:
    """Read the name, run the stage, end with its status."""
    name = sys.stdin.readline().strip()
    if not name:
        return 0
    how = {"force": True, "no_commit": True} if AFRESH in sys.argv else {}
    logging.getLogger("dvc").setLevel(logging.ERROR)  # its advice (git add dvc.lock) is not for a run
    try:
        Repo(_wait_for_lock=True).reproduce(name, single_item=True, run_env={"PYTHONPATH": os.getcwd()}, **how)
    except DvcException as error:
        reason = error.__cause__ or error
        if isinstance(reason, StageCmdFailedError):
            status = re.search(r"exited with (\d+)$", str(reason))
            return min(int(status[1]), 255) if status else 1
        print(f"{CAUSE}{reason}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(reproduce_one())
