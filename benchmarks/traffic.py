"""What the processes that hold one sequence send each other: S2-Attn's half group, Ulysses' heads, a ring's keys and values.

`python -m benchmarks.traffic` runs the first two on real processes (gloo, loopback), counts the bytes that they hand to
torch.distributed in one layer's forward and backward, and stops unless the formula says the same. Then it prints the formulas for
real models. A ring is by formula alone: keys and values pass P - 1 times forward and again backward, their gradients P times.

Letters: L tokens; P processes; S = L/P; H query heads; K key/value heads; D head dimension; G group.
"""

import argparse
import os
import socket
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.multiprocessing.spawn import spawn

from longlora.attention.groups import group_size
from longlora.parallel.ranks import Ranks
from longlora.parallel.sequence_parallel import Together, join, parallel_attention

RATIO = 0.25


@dataclass(frozen=True)
class Shape:
    name: str
    length: int
    heads: int
    kv_heads: int
    dim: int
    itemsize: int = 2


SMALL = (Shape("equal heads", 1024, 8, 8, 16), Shape("grouped heads", 1024, 8, 4, 16), Shape("cut head", 960, 12, 4, 8))
REAL = (
    Shape("Llama 2 7B", 32768, 32, 32, 128),
    Shape("Llama 2 7B", 102400, 32, 32, 128),
    Shape("Llama 3 8B", 131072, 32, 8, 128),
)


def s2_bytes(shape: Shape, processes: int) -> int:
    """Keys and values of half a group, of the moved heads, over each of the P - 1 borders; their gradients back."""
    group = group_size(shape.length, RATIO)
    moved = shape.kv_heads - shape.heads // 2 // (shape.heads // shape.kv_heads)
    return (processes - 1) * 2 * (group // 2) * moved * shape.dim * shape.itemsize * 2


def ulysses_bytes(shape: Shape, processes: int) -> int:
    """q, k, v and the output; of each process's S tokens, all but a P-th of the heads leave. The gradients do the same."""
    own = shape.length // processes
    return (processes - 1) * own * 2 * (shape.heads + shape.kv_heads) * shape.dim * shape.itemsize * 2


def ring_bytes(shape: Shape, processes: int) -> int:
    """Every process passes on S tokens' keys and values: P - 1 times, again backward, and P times their gradients."""
    own = shape.length // processes
    return processes * own * 2 * shape.kv_heads * shape.dim * shape.itemsize * (3 * processes - 2)


class Count:
    """The bytes that this process hands over for others."""

    def __init__(self) -> None:
        self.sent = 0
        self.messages, self.exchange = distributed.batch_isend_irecv, distributed.all_to_all_single
        distributed.batch_isend_irecv, distributed.all_to_all_single = self.send, self.swap

    def send(self, moves: list[distributed.P2POp]) -> list[distributed.Work]:
        self.sent += sum(m.tensor.numel() * m.tensor.itemsize for m in moves if m.op is distributed.isend)
        return self.messages(moves)

    def swap(self, coming: torch.Tensor, leaving: torch.Tensor, *, group: distributed.ProcessGroup) -> None:
        processes = distributed.get_world_size(group)
        self.sent += leaving.numel() * leaving.itemsize * (processes - 1) // processes
        self.exchange(coming, leaving, group=group)


def one_layer(shape: Shape, together: Together, *, group: int) -> None:
    """Forward and backward on this process's tokens."""
    own = shape.length // together.degree
    inputs = [
        torch.randn(1, own, h, shape.dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    parallel_attention(*inputs, together=together, group_size=group).sum().backward()


def process(rank: int, processes: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    together, count = join(Ranks(rank, processes, processes)), Count()
    for shape in SMALL:
        for formula, group in ((s2_bytes, group_size(shape.length, RATIO)), (ulysses_bytes, shape.length)):
            count.sent = 0
            one_layer(shape, together, group=group)
            total = torch.tensor(count.sent)
            distributed.all_reduce(total)
            if total != formula(shape, processes):
                raise SystemExit(
                    f"{shape}, {processes}: counted {total}, {formula.__name__} {formula(shape, processes)}"
                )
            if rank == 0:
                print(
                    f"{processes} processes, {shape.name}: {total:,} bytes counted, as {formula.__name__} says",
                    flush=True,
                )
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def table() -> Table:
    shown = Table(
        title="MiB sent per layer, forward and backward, by all processes together; bfloat16, batch 1, group ratio 1/4"
    )
    for heading in ("model", "tokens", "processes", "S2-Attn", "Ulysses", "ring", "Ulysses / S2", "ring / S2"):
        shown.add_column(heading, justify="right")
    for shape in REAL:
        for processes in (2, 4):
            ours, ulysses, ring = (f(shape, processes) for f in (s2_bytes, ulysses_bytes, ring_bytes))
            sizes = [f"{n / 2**20:,.0f}" for n in (ours, ulysses, ring)]
            ratios = [f"{n / ours:.1f}" for n in (ulysses, ring)]
            shown.add_row(shape.name, f"{shape.length:,}", str(processes), *sizes, *ratios)
    return shown


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for processes in (2, 4):
        spawn(process, args=(processes, free_port()), nprocs=processes)
    Console(width=120).print(table())


if __name__ == "__main__":
    main()
