"""The `longlora` command from its first line on: Ctrl-C while its modules are still imported ends it in silence, too."""

import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """The command line, which handles signals by itself once it is imported; before that, nothing is under way."""
    signal.signal(signal.SIGINT, end)
    open_closed()
    gc.set_threshold(50_000)  # what is imported stays: at 700 new objects it is looked through again and again
    from flows.cli.main import main as command

    command()


def open_closed() -> None:
    """Give a standard stream that the caller closed the null device; else the next file that is opened takes its number, and is
    written to as if it were the terminal."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)  # dup2 leaves it as it is where the number is the same
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  it stays open


def end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # what was imported might swallow an exception, or tell of it
