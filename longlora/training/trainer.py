"""The Trainer of long contexts: each process on its own blocks, exact checkpoints, no patience for a loss that is not finite."""

from collections.abc import Callable, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from longlora.attention.shifted import Attention
from longlora.parallel.ranks import Ranks
from longlora.training.checkpoint import ExactTrainer


class LongTrainer(ExactTrainer):
    """The exact Trainer, each process on its own share of the blocks, without patience for a loss that is not finite."""

    def __init__(self, *, ranks: Ranks, adam: Callable[[], torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks, self.adam = ranks, adam
        self.micro_batch_size: int | None = None  # of this process, counted over the whole run

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self.adam()
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        blocks, micro_batch_size = self.train_dataset, self.args.per_device_train_batch_size
        assert isinstance(blocks, Dataset) and isinstance(blocks, Sized)
        share = self.ranks.share(len(blocks), micro_batch_size=micro_batch_size)
        return DataLoader(
            blocks,
            sampler=share,
            batch_size=micro_batch_size,
            collate_fn=default_data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        done = self.state.global_step * self.args.gradient_accumulation_steps
        self.micro_batch_size = done if self.micro_batch_size is None else self.micro_batch_size + 1
        torch.manual_seed(noise_seed(self.args.seed, micro_batch_size=self.micro_batch_size, ranks=self.ranks))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower fit.learning_rate, or look at the data"
            )
        return loss


def noise_seed(seed: int, *, micro_batch_size: int, ranks: Ranks) -> int:
    """Of the noise (dropout, NEFTune) on the n-th micro-batch of a process.

    It belongs to the blocks, and to the place in the sequence: a run that resumes, on however many replicas, draws the same; no two
    processes do.
    """
    among_all = micro_batch_size * ranks.replicas + ranks.replica
    return int(np.random.SeedSequence([seed, among_all, ranks.place]).generate_state(1, np.uint64)[0])


class Switch(TrainerCallback):
    """Full attention for the last steps, if asked for: what sparse training leaves undone at long range."""

    def __init__(self, apply: Callable[[Attention], None], *, attention: Attention, steps: int) -> None:
        self.apply, self.attention = apply, attention
        self.first_full = steps - round(steps * attention.full_attention_last)
        self.switched = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.first_full and not self.switched:
            self.apply(self.attention.model_copy(update={"pattern": "full"}))
            self.switched = True
