"""Attention alone, forward and backward: S2-Attn against full causal SDPA and against the authors' roll and mask, side by side.

`python -m benchmarks.attention` measures ratios, not seconds: the three take turns, and a ratio is the median over the turns
of ours by theirs within a turn, so a busy machine disturbs all alike. Wall time and CPU time of the process are both given; a
busy machine lengthens the second less. Peak memory is that of a fresh process each, above what it held before.

Letters: B batch; L tokens; H heads; D head dimension; G group; N groups.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention import group_size, shifted_sparse_attention

HEADS, DIM, RATIO = 8, 64, 0.25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (2048, 4096, 8192, 16384)
TURNS = 5
PATIENCE = 300  # seconds, after which three turns are enough

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def s2(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    out_BLHD = shifted_sparse_attention(q_BHLD, k_BHLD, v_BHLD, group_size=group_size(q_BHLD.shape[2], RATIO))
    return out_BLHD.transpose(1, 2)


def full(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)


def roll_and_mask(q_BHLD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper: roll half of the heads, fold the groups into the batch, attend as usual, unfold, roll back."""
    batch, heads, length, dim = q_BHLD.shape
    group = group_size(length, RATIO)

    def rolled(x_BHLD: torch.Tensor, by: int) -> torch.Tensor:
        still, moved = x_BHLD.chunk(2, dim=1)
        return torch.cat([still, moved.roll(by, dims=2)], dim=1)

    q, k, v = (
        rolled(x, -group // 2).transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)
        for x in (q_BHLD, k_BHLD, v_BHLD)
    )
    mask_GG = torch.full((group, group), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    scores_NHGG = q @ k.transpose(-1, -2) * dim**-0.5 + mask_GG
    out_NHGD = scores_NHGG.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    out_BHLD = out_NHGD.transpose(1, 2).reshape(batch, length, heads, dim).transpose(1, 2)
    return rolled(out_BHLD, group // 2)


METHODS: dict[str, Attend] = {"s2": s2, "full": full, "roll_and_mask": roll_and_mask}


def prepared(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and an output gradient, laid out as a transformer does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, length, HEADS, DIM, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def once(method: Attend, inputs: list[torch.Tensor], grad: torch.Tensor) -> tuple[float, float]:
    """Wall and CPU seconds of one forward and backward."""
    wall, cpu = time.perf_counter(), time.process_time()
    torch.autograd.grad(method(*inputs), inputs, grad)
    return time.perf_counter() - wall, time.process_time() - cpu


def fits(length: int, dtype: torch.dtype) -> bool:
    """Whether roll and mask's scores, some five copies of N x H x G x G at its peak, leave half of the free memory alone."""
    group = group_size(length, RATIO)
    return 5 * length * group * HEADS * (dtype.itemsize + 2) < psutil.virtual_memory().available / 2


def turns(length: int, dtype: torch.dtype, *, count: int) -> dict[str, dict[str, float]]:
    """Per method the median seconds, and the median over at most `count` turns of ours by theirs."""
    inputs, grad = prepared(length, dtype)
    methods = {name: m for name, m in METHODS.items() if name != "roll_and_mask" or fits(length, dtype)}
    for method in methods.values():  # first calls allocate and compile
        once(method, [x[:, :, :512] for x in inputs], grad[:, :, :512])
    rounds: list[dict[str, tuple[float, float]]] = []
    started = time.monotonic()
    while len(rounds) < min(3, count) or (len(rounds) < count and time.monotonic() - started < PATIENCE):
        rounds.append({name: once(m, inputs, grad) for name, m in methods.items()})
    result: dict[str, dict[str, float]] = {}
    for name in methods:
        result[name] = {
            "wall_s": statistics.median(r[name][0] for r in rounds),
            "cpu_s": statistics.median(r[name][1] for r in rounds),
            "s2_by_this_wall": statistics.median(r["s2"][0] / r[name][0] for r in rounds),
            "s2_by_this_cpu": statistics.median(r["s2"][1] / r[name][1] for r in rounds),
            "turns": len(rounds),
        }
    return result


def peak_mb(name: str, length: int, dtype_name: str) -> float:
    """Peak memory of one forward and backward in a fresh process, above that of the inputs."""
    command = [sys.executable, "-m", "benchmarks.attention", "--one", name, str(length), dtype_name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def run_one(name: str, length: int, dtype_name: str) -> float:
    """In the fresh process: MB by which the peak rises."""
    torch.set_num_threads(1)
    inputs, grad = prepared(length, DTYPES[dtype_name])
    once(METHODS[name], [x[:, :, :64] for x in inputs], grad[:, :, :64])
    ballast = bytearray(b"1") * max(0, peak() - psutil.Process().memory_info().rss)  # up to the peak of the imports
    before = peak()
    once(METHODS[name], inputs, grad)
    assert len(ballast) >= 0
    return (peak() - before) / 2**20


def peak() -> int:
    """Bytes that this process ever held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(rows: list[dict[str, object]]) -> Table:
    shown = Table(title=f"forward + backward, {HEADS} heads of {DIM}, group ratio {RATIO}; s2 by ... (wall, CPU time)")
    for heading in ("L", "format", "s2 / full", "s2 / roll and mask", "MB s2", "MB full", "MB roll and mask"):
        shown.add_column(heading, justify="right")
    for row in rows:
        methods = row["methods"]
        assert isinstance(methods, dict)
        cells = [
            f"{m['s2_by_this_wall']:.3f}, {m['s2_by_this_cpu']:.3f}" if (m := methods.get(name)) else "too large here"
            for name in ("full", "roll_and_mask")
        ]
        memory = [f"{m['peak_mb']:.0f}" if "peak_mb" in (m := methods.get(name, {})) else "" for name in METHODS]
        shown.add_row(f"{row['length']}", str(row["dtype"]), *cells, *memory)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short length, under a minute")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; one gives the steadiest ratios")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attention.json"))
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "LENGTH", "DTYPE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(run_one(chosen.one[0], int(chosen.one[1]), chosen.one[2]))
        return
    torch.set_num_threads(chosen.threads)
    lengths, count = ((1024,), 3) if chosen.quick else (chosen.lengths, chosen.turns)
    console = Console(width=120)
    rows: list[dict[str, object]] = []
    for dtype in chosen.dtypes:
        for length in lengths:
            console.print(f"{dtype}, {length} tokens ...", style="dim")
            methods = turns(length, DTYPES[dtype], count=count)
            if not (chosen.quick and dtype == "bfloat16"):
                for name, numbers in methods.items():
                    numbers["peak_mb"] = peak_mb(name, length, dtype)
            rows.append({"length": length, "dtype": dtype, "methods": methods})
    setting = {"heads": HEADS, "dim": DIM, "group_ratio": RATIO, "batch": 1, "threads": chosen.threads}
    machine = {
        "processor": torch.cpu.get_capabilities()["cpu_name"],
        "system": platform.system(),
        "torch": torch.__version__,
    }
    chosen.out.write_text(json.dumps({"setting": setting, "machine": machine, "rows": rows}, indent=2) + "\n")
    console.print(table(rows))
    console.print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()
