"""Peak memory of a work in a process of its own: `python -m benchmarks.fresh MODULE WORD...` prints MB (2^20 bytes).

The module's `alone(WORD...)` gives a small work to warm up with and the work itself; what is told is by how much the second
raises the most that the process ever held. What imports and the first calls held and gave back is filled up before, so that the
work cannot hide in it.
"""

import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


def rise_mb(module: str, *words: object) -> float:
    """MB of the work of `benchmarks.MODULE`."""
    command = [sys.executable, "-m", "benchmarks.fresh", module, *map(str, words)]
    # One arena, and large blocks given back at once: else what was freed, and lies in pieces, is counted.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment)
    return float(done.stdout)


def peak() -> int:
    """Bytes that this process ever held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(module: str, *words: str) -> None:
    warm, work = importlib.import_module(f"benchmarks.{module}").alone(*words)
    warm()
    ballast = bytearray(b"1") * max(0, peak() - psutil.Process().memory_info().rss)
    before = peak()
    work()
    assert len(ballast) >= 0
    print((peak() - before) / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
