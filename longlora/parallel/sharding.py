"""Measures over several processes: each computes its share of the batches, and all know all results.

The launcher says so in the environment (torchrun sets RANK and WORLD_SIZE); without one, a single process does everything.
Batches are those of a single process, dealt out in turn, so the scores are the same to the last bit. Results are small: they
travel over gloo, which needs no GPU, and are added to zeros, which rounds nothing. Every process holds a whole model.
A failure in one of them, inside of `together`, ends all, and is told once.
"""

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed

PATIENCE = timedelta(days=1)
"""How long a process waits for the slowest one."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def ours(number: int) -> bool:
    """Whether the batch of this number is this process's."""
    return number % world() == rank()


def whole(share: np.ndarray) -> np.ndarray:
    """The array that the processes filled together, each its share, where the others left zero. All must ask, in one order.

    Raises:
        SystemExit: another process failed in `together`, or is gone.
    """
    if world() == 1:
        return share + 0  # 0.0 for -0.0, as the sum over several gives
    failed = first_failed(False)
    if failed is not None:
        end_after(failed)
    return added(share)


def gathered(part: bytes) -> list[bytes]:
    """What each process gives, none of them nothing, by rank. All must ask, in one order."""
    sizes_W = np.zeros(world(), dtype=np.int64)
    sizes_W[rank()] = len(part)
    sizes_W = whole(sizes_W)
    parts_WS = np.zeros((world(), sizes_W.max()), dtype=np.uint8)
    parts_WS[rank(), : len(part)] = np.frombuffer(part, dtype=np.uint8)
    return [row_S[:size].tobytes() for row_S, size in zip(whole(parts_WS), sizes_W, strict=True)]


def merged(part: dict[int, Any]) -> dict[int, Any]:
    """What all processes found, by number; each gives what it found, as JSON can hold it. All must ask, in one order."""
    parts = gathered(json.dumps(list(part.items())).encode())
    return {number: value for part in parts for number, value in json.loads(part)}


def added(share: np.ndarray) -> np.ndarray:
    """The sum over all processes, of numbers that all but one left zero."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    sent = torch.from_numpy(share.copy())
    try:
        distributed.all_reduce(sent, op=distributed.ReduceOp.SUM)
    except RuntimeError as error:  # gloo's: a connection is closed
        if rank() == 0:  # the one that is gone could not say it, and one line is enough
            print(f"error: another process has ended ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    return sent.numpy()


def first_failed(failed: bool) -> int | None:
    """The lowest rank that has failed; all processes learn it at the same time."""
    flags_W = np.zeros(world(), dtype=np.uint8)
    flags_W[rank()] = failed
    flags_W = added(flags_W)
    return int(flags_W.argmax()) if flags_W.any() else None


def end_after(failed: int) -> NoReturn:
    """Exit silently after the failed rank has reported: a launcher ends all processes as soon as the first has ended."""
    with suppress(RuntimeError):  # gloo's: the connection is closed
        distributed.recv(torch.zeros(1), src=failed)
    raise SystemExit(2)


@contextmanager
def together() -> Generator[None, None, None]:
    """What fails here in one process ends all of them: the first of those that failed raises it, the others end without a word.

    Nothing but `whole` and what is made of it may wait for the other processes in here.
    """
    if world() == 1:
        yield
        return
    try:
        yield
        whole(np.zeros(1))  # so none leaves before all are done
    except Exception as error:
        failed = first_failed(True)
        if failed is not None and failed != rank():
            end_after(failed)
        error.add_note(f"in process {rank()} of 0 to {world() - 1}, which ends all of them")
        raise


def say(text: str) -> None:
    """Print it, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def put(result: dict[str, Any], file: Path, *, indent: int | None = 2) -> None:
    """The result as JSON, written once for all processes."""
    if rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=indent, allow_nan=False) + "\n")


def write(result: dict[str, Any], file: Path, *, indent: int | None = 2) -> None:
    """The result as JSON, written once for all processes, which part here."""
    put(result, file, indent=indent)
    part()


def part() -> None:
    """Nothing more is asked of the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
