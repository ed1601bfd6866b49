"""A training small enough to run in seconds, and what it leaves."""

import csv
from pathlib import Path

import numpy as np
import pytest
from specimens import ADAPTER, ATTENTION, FIT, POSITION, folder

from longlora.data.tokens import write
from longlora.training.fit import LongTrainer, train


def prepare(place: Path) -> None:
    """A base, and tokens that can be learnt."""
    folder(place / "base")
    tokens = place / "tokens"
    tokens.mkdir()
    cycle = np.arange(900) % 31
    write([cycle, cycle[:70], cycle[:400]], tokens / "train.safetensors", vocabulary=300)
    write([cycle[:128], cycle[5:133]], tokens / "recall.safetensors", vocabulary=300)


def run(place: Path, name: str, **changes) -> Path:
    """Train into place/name; `changes` are keys of the fit section."""
    train(
        place / "tokens",
        pairs=changes.pop("pairs", None),
        base=place / "base",
        adapter_folder=place / name,
        history=place / f"{name}.csv",
        cost=place / f"{name}.json",
        position=changes.pop("position", POSITION),
        attention=changes.pop("attention", ATTENTION),
        adapter=changes.pop("adapter", ADAPTER),
        settings=FIT.model_copy(update=changes),
    )
    return place / name


def cut_off(place: Path, name: str, patch: pytest.MonkeyPatch, **changes) -> None:
    """A `run` that ends without a word in its sixth step."""
    step = LongTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with patch.context() as inside:
        inside.setattr(LongTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(place, name, **changes)


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def history(file: Path) -> list[dict[str, float]]:
    with file.open() as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
