"""What a training run tells while it runs, and what it cost.

The history is a CSV that DVC plots and that whoever tracks the run follows; it holds nothing that differs between two equal
runs. Times and memory do differ, so they are in a file of their own.
"""

import csv
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.model.adapter import trained_parameters
from longlora.section import write_json
from longlora.training.energy import Meter

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens")
UNCOUNTED = "not measurable here"


class History(TrainerCallback):
    """The training history as a CSV that grows while training runs, and a line in the log for each row."""

    def __init__(self, file: Path, *, steps: int, tokens_per_step: int) -> None:
        self.file, self.steps, self.tokens_per_step = file, steps, tokens_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("w", newline="") as stream:
                rows = csv.writer(stream)
                rows.writerow(COLUMNS)
                rows.writerows(self.row(entry) for entry in state.log_history if "loss" in entry)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if not state.is_world_process_zero or "loss" not in entry:
            return
        with self.file.open("a", newline="") as stream:
            csv.writer(stream).writerow(self.row(entry))
        pace = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
        print(
            f"step {state.global_step}/{self.steps}  loss {entry['loss']:.4f}  "
            f"{self.tokens_per_step / pace:,.0f} tokens/s  {pace * (self.steps - state.global_step):.0f} s left  "
            f"{peak_memory() / 1e9:.2f} GB",
            flush=True,
        )

    def row(self, entry: dict[str, float]) -> list[float]:
        return [
            entry["step"],
            entry["loss"],
            entry["grad_norm"],
            entry["learning_rate"],
            int(entry["step"]) * self.tokens_per_step,
        ]


def write_cost(file: Path, *, model: nn.Module, tokens: int, meter: Meter) -> None:
    """What was spent since `meter` was made (after a resume: since then), under the file's own name: memory of this process,
    energy of this machine."""
    seconds, energy = meter.stop()
    figures: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "trainable_parameters": sum(p.numel() for p in trained_parameters(model).values()),
        **{f"{kind}_energy_wh": round(used, 3) for kind, used in energy.items()},
        **({} if energy else {"energy": UNCOUNTED}),
    }
    write_json({file.stem: figures}, file)


def peak_memory() -> int:
    """Bytes: of the device where there is one, else of this process."""
    return (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
