"""The command line: help, and a run in which nothing is to be done (on the tests' dummy project), against Python's own start."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.fresh import ROOT
from benchmarks.turns import Cases, Sizes, take_turns

LONGLORA = [sys.executable, "-m", "flows.cli.main"]


def measure(*, patience: float) -> dict[str, Any]:
    from tests import dummy

    with tempfile.TemporaryDirectory() as scratch:
        folder = dummy.make(Path(scratch) / "dummy")
        environment = {**dummy.clean_environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}."}

        def call(*command: str) -> None:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")

        call(*LONGLORA, "run")
        works = {
            "python": partial(call, sys.executable, "-c", "pass"),
            "help": partial(call, *LONGLORA, "--help"),
            "no-op run": partial(call, *LONGLORA, "run"),
        }
        return {"methods": take_turns(works, ours="no-op run", patience=patience)}


def cases(sizes: Sizes) -> Cases:
    return {"start": partial(measure, patience=sizes.patience)}
