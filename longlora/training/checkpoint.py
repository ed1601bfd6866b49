"""Checkpoints: whole or absent, without pickle, and found only by the run they belong to.

They lie outside the stage's outputs, which DVC deletes before every attempt, in a folder named by a digest of all that
determines the result: a retry resumes, a changed parameter or line of code never resumes from a foreign checkpoint. Tested: a
run that was cut off anywhere ends with the bytes of one that was not. Two runs may want the same training at the same time: one
waits.
"""

import ast
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from longlora.model.adapter import trained_parameters
from longlora.parallel import zero
from longlora.parallel.ranks import any_of
from longlora.section import Section

ADAM = ("step", "exp_avg", "exp_avg_sq")
LIBRARY = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft")
LOOK = 1.0  # seconds between two looks at a lock


class ExactTrainer(Trainer):
    """The Trainer with checkpoints that are whole or absent, hold no pickle, and resume bit for bit.

    A checkpoint knows nothing of how many processes wrote it, or how they shared it.
    """

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
        """The trained parameters by name; every process must ask, and only the one that saves is sure of an answer."""
        trained = trained_parameters(self.model)
        if self.is_deepspeed_enabled:
            return zero.whole(trained, keep=self.args.should_save)
        return {name: p.detach().contiguous() for name, p in trained.items()}

    def whole_adam(self) -> dict[str, torch.Tensor]:
        """Adam's state, as `<parameter>/<kind>`, likewise."""
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
        """The sum of losses since the last row of the history, of each process; every process must ask."""
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
        pass  # LongTrainer gives each micro-batch a seed of its own


def load_parameters(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Give the trained parameters of `model` the values in `saved`, which holds just these."""
    own = trained_parameters(model)
    assert saved.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


class Stop(TrainerCallback):
    """SIGTERM (a scheduler's, or ours) ends training after the current step, with a checkpoint.

    It reaches several processes at several times, or only some of them: they stop together, after the same step.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked = any_of(self.asked, device=args.device)
        if self.asked:
            control.should_save = control.should_training_stop = True


def digest(inputs: list[Path], *, sections: tuple[Section, ...]) -> str:
    """A name for all that determines the result: the sections, every byte of the inputs, and the code."""
    said = [[s.model_dump() for s in sections], [f"{package} {version(package)}" for package in PACKAGES]]
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    files = sorted(f for folder in inputs for f in folder.rglob("*") if f.is_file())
    for file in [*sorted(code_of(Path(__file__).with_name("fit.py"))), *files]:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def code_of(file: Path) -> set[Path]:
    """`file` and what it imports of this library, directly or not. Read from the files: which modules a process has loaded
    besides differs from one that trains alone to one of several."""
    names = {
        name
        for n in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(n, ast.ImportFrom) and n.module
        for name in (n.module, *(f"{n.module}.{alias.name}" for alias in n.names))
    }
    own = [LIBRARY.parent.joinpath(*n.split(".")).with_suffix(".py") for n in names if n.startswith(f"{LIBRARY.name}.")]
    return {file}.union(*(code_of(other) for other in own if other.is_file()))


def checkpoint_folder(name: str) -> Path:
    """Outside the stage's outputs, which DVC deletes before every attempt."""
    return Path(os.environ.get("LONGLORA_CHECKPOINTS", ".longlora/checkpoints")) / name


@contextmanager
def alone(checkpoints: Path, *, first: bool, device: torch.device) -> Generator[None]:
    """Be the only training with these `checkpoints`; says so if that takes waiting. All its processes ask, the `first` one locks.

    The kernel frees the lock when its holder dies, however it dies. It is looked at again and again, and all are told each
    time: processes that waited for the first one in a single exchange would give up after half an hour.
    """
    if first:
        checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.with_name(f"{checkpoints.name}.lock").open("a") if first else nullcontext() as file:
        said = False
        while any_of(file is not None and not locked(file), device=device):
            if file and not said:
                print(f"waiting: another run trains the same (it holds {file.name})", flush=True)
                said = True
            time.sleep(LOOK)
        yield


def locked(file: TextIOWrapper) -> bool:
    """Whether `file` could be locked; its closing frees it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def latest(checkpoints: Path) -> Path | None:
    return max(checkpoints.glob("checkpoint-*"), key=checkpoint_step, default=None)
