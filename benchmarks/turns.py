"""Ratios of times that hold on a busy machine too: the works take turns, and a ratio is of two neighbours in one turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE = 8.0
"""Seconds, after which the fewest turns are enough."""
FEWEST, MOST = 3, 15


@dataclass(frozen=True)
class Sizes:
    """How large the measurements are."""

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    half_lengths: tuple[int, ...] = (2048, 4096)
    """In bfloat16, of which full SDPA takes nine times as long on CPUs that have no instructions for it."""
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    loss_lengths: tuple[int, ...] = (2048, 8192)
    documents: int = 64
    patience: float = PATIENCE

    def pairs(self) -> list[tuple[str, int]]:
        """Number formats and lengths to compare attentions at."""
        return [*(("float32", n) for n in self.lengths), *(("bfloat16", n) for n in self.half_lengths)]


SMALL = Sizes((256,), (), (256, 512), (256,), documents=4, patience=0.2)

Cases = dict[str, Callable[[], dict[str, Any]]]
"""What a benchmark consists of: a name, and what measures it."""


def take_turns(works: Mapping[str, Callable[[], object]], *, ours: str, patience: float) -> dict[str, dict[str, Any]]:
    """Per work: median seconds; `ratio`, the median of ours by this over the turns, and its `interval`, from the smallest to the
    largest: of n turns it covers the true median with a probability of 1 - 2^(1-n), whatever the distribution.
    """
    rounds: list[dict[str, float]] = []
    started = time.monotonic()
    while len(rounds) < FEWEST or (len(rounds) < MOST and time.monotonic() - started < patience):
        rounds.append({name: seconds(work) for name, work in works.items()})
    result = {}
    for name in works:
        ratios = [r[ours] / r[name] for r in rounds]
        result[name] = {
            "seconds": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(ratios),
            "interval": [min(ratios), max(ratios)],
            "turns": len(rounds),
        }
    return result


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
