"""The Trainer of long contexts: each process on its own blocks, exact checkpoints, no patience for a loss that is not finite."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Sized
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import nested_gather

from longlora.attention.shifted import Attention
from longlora.model.adapter import trained_parameters
from longlora.parallel import zero
from longlora.parallel.ranks import Ranks, any_of
from longlora.training.checkpoint import checkpoint_step

ADAM = ("step", "exp_avg", "exp_avg_sq")


class LongTrainer(Trainer):
    """The Trainer with each process on its own share of the blocks, and without patience for a loss that is not finite.

    Its checkpoints are whole or absent, hold no pickle, and resume bit for bit. A checkpoint knows nothing of how many processes
    wrote it, or how they shared it.
    """

    def __init__(self, *, ranks: Ranks, adam: Callable[[], torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks, self.adam = ranks, adam
        self.micro_batch_index: int | None = None  # of this process, counted over the whole run

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
        self.micro_batch_index = done if self.micro_batch_index is None else self.micro_batch_index + 1
        torch.manual_seed(noise_seed(self.args.seed, micro_batch_index=self.micro_batch_index, ranks=self.ranks))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower fit.learning_rate, or look at the data"
            )
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """The norm, before a checkpoint is saved (and, but for DeepSpeed, the step taken): one with weights that are not finite
        would be the only one, and no attempt could go on from it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise ValueError(
                f"the norm of the gradients is {float(norm)} at step {self.state.global_step + 1}, whose loss is finite: the same "
                "command goes on from the last checkpoint; should it end here again, lower fit.learning_rate"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(self.args.output_dir)
        partial = root / f"partial-{self.state.global_step}"
        # Every process may have to give its part.
        parameters, adam, unlogged = self.whole_parameters(), self.whole_adam(), self.unlogged()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(parameters, partial / "parameters.safetensors")
            save_file(adam, partial / "optimizer.safetensors")
            (partial / "unlogged.json").write_text(json.dumps(unlogged))
            self.state.save_to_json(str(partial / "trainer_state.json"))
            partial.rename(root / f"checkpoint-{self.state.global_step}")
            for old in sorted(root.glob("checkpoint-*"), key=checkpoint_step)[:-1]:
                shutil.rmtree(old)

    def whole_parameters(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name. Collective: every rank calls; only the one that saves is sure to get tensors."""
        trained = trained_parameters(self.model)
        if self.is_deepspeed_enabled:
            return zero.whole(trained, keep=self.args.should_save)
        return {name: p.detach().contiguous() for name, p in trained.items()}

    def whole_adam(self) -> dict[str, torch.Tensor]:
        """Adam's state, as `<parameter>/<kind>`. Collective, as `whole_parameters`."""
        trained = trained_parameters(self.model)
        if self.is_deepspeed_enabled:
            states = zero.whole_states(trained, engine=self.deepspeed, keep=self.args.should_save)
        else:
            assert self.optimizer is not None
            states = {name: self.optimizer.state[p] for name, p in trained.items()}
        return {
            f"{name}/{kind}": t.detach().contiguous() for name, state in states.items() for kind, t in state.items()
        }

    def unlogged(self) -> dict[str, Any]:
        """The sum of losses since the last row of the history, of each process. Collective: every rank calls."""
        losses = nested_gather(self._tr_loss, self.args.parallel_mode)
        assert isinstance(losses, torch.Tensor)
        return {"since": self._globalstep_last_logged, "losses": losses.flatten().tolist()}

    def _run_epoch(self, *args: Any, **settings: Any) -> None:
        if checkpoint := settings["resume_from_checkpoint"]:  # the Trainer has begun a new sum just now
            unlogged = json.loads((Path(checkpoint) / "unlogged.json").read_text())
            losses, rank = unlogged["losses"], self.args.process_index
            # The history has the mean over the processes, however many there are now.
            own = losses[rank] if len(losses) == self.args.world_size else fmean(losses)
            self._tr_loss.fill_(own)
            self._globalstep_last_logged = unlogged["since"]
        super()._run_epoch(*args, **settings)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # The Trainer would look for DeepSpeed's own checkpoint, a pickle per process.
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parameters(self.model, load_file(Path(resume_from_checkpoint) / "parameters.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = load_file(Path(checkpoint) / "optimizer.safetensors")
        trained = trained_parameters(self.model)
        states = {p: {kind: saved[f"{name}/{kind}"] for kind in ADAM} for name, p in trained.items()}
        assert len(saved) == len(ADAM) * len(trained)
        assert self.optimizer is not None
        if self.is_deepspeed_enabled:
            zero.load_states(states, engine=self.deepspeed)
        else:
            self.optimizer.state.update(
                {p: {kind: t if kind == "step" else t.to(p.device) for kind, t in s.items()} for p, s in states.items()}
            )
        # The schedule is a function of the step alone; only its place in time has to be found again.
        step, schedule = self.state.global_step, self.lr_scheduler
        assert schedule is not None
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(
            {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # each micro-batch has a seed of its own


def load_parameters(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Give the trained parameters of `model` the values in `saved`, which holds just these."""
    own = trained_parameters(model)
    assert saved.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def noise_seed(seed: int, *, micro_batch_index: int, ranks: Ranks) -> int:
    """Of the noise (dropout, NEFTune) on the n-th micro-batch of a process.

    It belongs to the blocks, and to the process's rank in the sequence: a run that resumes, on however many replicas, draws the
    same; no two processes do.
    """
    among_all = micro_batch_index * ranks.replicas + ranks.replica
    return int(np.random.SeedSequence([seed, among_all, ranks.sp_rank]).generate_state(1, np.uint64)[0])


class FullAttentionAtEnd(TrainerCallback):
    """Full attention for the last steps, if asked for: what sparse training leaves undone at long range."""

    def __init__(self, apply: Callable[[Attention], None], *, attention: Attention, steps: int) -> None:
        self.apply, self.attention = apply, attention
        self.first_full = steps - round(steps * attention.full_attention_last)
        self.switched = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.switched:  # by the training before, of the same model
            self.apply(self.attention)
            self.switched = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.first_full and not self.switched:
            self.apply(self.attention.model_copy(update={"pattern": "full"}))
            self.switched = True


class Stop(TrainerCallback):
    """SIGTERM (a scheduler's, or ours) ends training after the current step, with a checkpoint.

    It reaches several processes at several times, or only some of them: they stop together, after the same step.
    """

    def __init__(self) -> None:
        self.asked = False  # of this process, at any moment
        self.agreed = False  # by all of them, after a step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agreed = any_of(self.asked, device=args.device)
        if self.agreed:
            control.should_save = control.should_training_stop = True
