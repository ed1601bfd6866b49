"""Perplexity's tokens per second against the bare forward pass of the model, without logits, on the committed model.

    python -m benchmarks.evaluation [LENGTH]

CPU time of one thread, the three in turn, the best of each: what else the machine does changes little.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from longlora.evaluation.windows import Window, last_nats, token_nats
from longlora.model.load import open_model

WINDOWS, ROUNDS, SCORED = 4, 3, 256


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main(length: int) -> None:
    torch.set_num_threads(1)
    model = open_model(Path(__file__).parent.parent / "tiny/model")
    documents = [np.random.default_rng(0).integers(3, 259, size=WINDOWS * length).astype(np.uint16)]
    last = [Window(0, i * length, (i + 1) * length, SCORED) for i in range(WINDOWS)]
    every = [Window(0, w.start, w.end, length - 1) for w in last]

    @torch.inference_mode()
    def bare() -> None:
        for w in last:
            model.base_model(
                input_ids=torch.from_numpy(documents[0][w.start : w.end].astype(np.int64))[None], use_cache=False
            )

    works = {
        "bare forward": bare,
        f"nats of the last {SCORED}": lambda: last_nats(model, documents=documents, windows=last),
        "nats of every token": lambda: token_nats(model, documents=documents, windows=every),
    }
    best = {name: np.inf for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    for name, took in best.items():
        print(
            f"{name:22s} {WINDOWS * length / took:8,.0f} tokens/s, {best['bare forward'] / took:.2f} of the bare pass"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
