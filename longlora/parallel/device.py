"""The GPU that is a process's own."""

import os

import torch


def own_gpu() -> dict[str, int]:
    """A device map, as transformers takes one: the whole model on this process's own GPU.

    Some schedulers show each process its own GPU alone, which is then its first, whatever LOCAL_RANK says.
    """
    return {"": int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()}
