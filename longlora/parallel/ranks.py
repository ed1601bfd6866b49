"""Which process this is among those that train together, and which share of the work is its own.

The launcher says so in the environment (torchrun and deepspeed set RANK and WORLD_SIZE; without one there is one process). W
processes are D replicas of the training, of P processes each that hold one sequence together (LONGLORA_SEQUENCE_PARALLEL;
longlora/parallel/sequence_parallel.py). Whatever D is, step t trains on the same blocks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from longlora.parallel.layout import degree_of_sequences

FOREIGN = (
    "DYNAMO_BACKEND",
    "MIXED_PRECISION",
    "USE_DEEPSPEED",
    "USE_FSDP",
    "USE_MEGATRON_LM",
    "USE_PARALLELISM_CONFIG",
)
"""What `accelerate launch` says to accelerate, and so to the Trainer, behind the back of params.yaml."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    degree: int = 1
    """Consecutive processes that hold one sequence together."""

    @property
    def replicas(self) -> int:
        return self.world // self.degree

    @property
    def replica(self) -> int:
        return self.rank // self.degree

    @property
    def sp_rank(self) -> int:
        """Among the processes of one sequence: 0 has its first tokens."""
        return self.rank % self.degree

    def share(self, samples: int, *, micro_batch_size: int) -> list[int]:
        """The samples of this replica, in order: micro-batches are dealt out in turn, so that D of them follow one another."""
        return [i for i in range(samples) if i // micro_batch_size % self.replicas == self.replica]


def from_environment() -> Ranks:
    """Raises ValueError: the processes cannot be shared out to sequences, or would not meet, or their launcher says more than where
    they run."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    degree = degree_of_sequences()
    if world % degree:
        fitting = max(d for d in range(1, min(degree, world) + 1) if world % d == 0)
        raise ValueError(
            f"LONGLORA_SEQUENCE_PARALLEL = {degree} must divide the number of processes, {world}; the nearest is {fitting}"
        )
    if world > 1 and (missing := [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]):
        # With a GPU accelerate would take each for the only one: as many trainings, each on its share of the blocks alone.
        raise ValueError(
            f"WORLD_SIZE = {world} without {' and '.join(missing)}, so the processes would not meet: start them with torchrun, or "
            "set it in each (LOCAL_RANK: its number on its machine)"
        )
    must_say_places_alone()
    return Ranks(rank, world, degree)


def must_say_places_alone() -> None:
    """Raises ValueError: the launcher chose how to train, too, which would be another training under the parameters' name."""
    for name in (f"ACCELERATE_{kind}" for kind in FOREIGN):
        own = name == "ACCELERATE_USE_DEEPSPEED" and os.environ.get("LONGLORA_ZERO")  # accelerate sets it for ours, too
        said = os.environ.get(name, "")
        if said.lower() not in ("", "no", "false", "0") and not own:
            raise ValueError(
                f"{name}={said} (as `accelerate launch` sets it, by its configuration) chooses how to train, which params.yaml "
                'does: LONGLORA_LAUNCHER="torchrun --nproc-per-node N", and LONGLORA_ZERO for DeepSpeed'
            )


def any_of(asked: bool, *, device: torch.device) -> bool:
    """Whether any of the processes asks; all get the same answer at the same time."""
    if not distributed.is_initialized():
        return asked
    flag = torch.tensor(int(asked), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def must_agree(step: int, *, where: Path, device: torch.device) -> None:
    """Raises ValueError: the processes found checkpoints of different steps in `where` (0: none)."""
    if not distributed.is_initialized():
        return
    mine = torch.tensor(step, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_of_them, mine)
    steps = [int(s) for s in all_of_them]
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes find checkpoints of steps {', '.join(map(str, steps))} in {where}, and must find the same: "
            f"set LONGLORA_CHECKPOINTS to a folder that all nodes share"
        )
