"""Measures over several processes: each computes its share of the batches, and all know all results.

The launcher says so in the environment (torchrun sets RANK and WORLD_SIZE); without one, a single process does everything.
Batches are those of a single process, dealt out in turn, so the scores are the same to the last bit. Results are small: they
travel over gloo, which needs no GPU, and as bytes, which no addition rounds. Every process holds a whole model.
"""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

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
    """The array that the processes filled together, each its share, where the others left zero. All must ask, in one order."""
    if world() == 1:
        return share
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    sent = torch.from_numpy(np.ascontiguousarray(share).reshape(-1).view(np.uint8).copy())
    distributed.all_reduce(sent, op=distributed.ReduceOp.SUM)
    return sent.numpy().view(share.dtype).reshape(share.shape)


def say(text: str) -> None:
    """Print it, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def write(result: dict[str, Any], file: Path, *, indent: int | None = 2) -> None:
    """The result as JSON, written once for all processes, which part here."""
    if rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=indent, allow_nan=False) + "\n")
    if distributed.is_initialized():
        distributed.destroy_process_group()
