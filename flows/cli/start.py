"""The `longlora` command from its first line on: Ctrl-C while its modules are still imported ends it in silence, too."""

import gc
import os
import signal
from types import FrameType


def main() -> None:
    """The command line, which handles signals by itself once it is imported; before that, nothing is under way."""
    signal.signal(signal.SIGINT, end)
    gc.set_threshold(50_000)  # what is imported stays: at 700 new objects it is looked through again and again
    from flows.cli.main import main as command

    command()


def end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # what was imported might swallow an exception, or tell of it
