"""A command of ours over several processes: the launcher that the environment names takes its place, and starts it anew in each."""

import os
import shlex
import shutil
import sys

EVALUATION = "LONGLORA_EVALUATION_LAUNCHER"
"""What stands in place of python, as it does before a stage that measures."""


def start() -> None:
    """Become the launcher, with this command behind it; where none is named, go on.

    Raises:
        ValueError: there is no such program.
    """
    words = shlex.split(os.environ.pop(EVALUATION, ""))  # taken out, so that the processes do not start it once more
    if not words:
        return
    if not shutil.which(words[0]):
        raise ValueError(f"{EVALUATION}: no program {words[0]}")
    os.execvp(words[0], [*words, "-m", "flows.cli.main", *sys.argv[1:]])
