"""DeepSpeed ZeRO in real processes: the training is that of one process without it, and so are the adapter and the checkpoints."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import together
import torch
import yaml
from safetensors.torch import load_file
from test_ranks import (
    ROOT,
    killed_at_five,
    log_writes,
    nearly_equal,
    the_stage_trains_what_one_process_does,
    train_here,
)
from training import run, weights

from longlora.model.merge import merge
from longlora.parallel.zero import Zero, zero_from_environment
from longlora.training.trainer import LongTrainer

pytestmark = pytest.mark.slow  # real processes
EACH = {"micro_batch_size": 1, "global_batch_size": 2}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def zero(stage: int, *, offload: bool = False, sequence: int = 1) -> dict[str, str]:
    return {
        "LONGLORA_ZERO": str(stage),
        "LONGLORA_ZERO_OFFLOAD": str(int(offload)),
        "LONGLORA_SEQUENCE_PARALLEL": str(sequence),
        "DS_ACCELERATOR": "cpu",
    }


@needs_deepspeed
def test_stage_3_trains_what_one_process_does_and_saves_it_whole_once(place):
    run(place, "one", **EACH)
    together.run(2, log_writes, place, "two", EACH, **zero(3))
    nearly_equal(place / "two", place / "one")
    assert (place / "opened-by-1").read_text() == ""
    assert sorted(f.name for f in (place / "two").iterdir()) == sorted(f.name for f in (place / "one").iterdir())
    assert {name.split(".")[-2] for name in load_file(place / "two/adapter_model.safetensors")} >= {
        "embed_tokens",
        "norm",
        "input_layernorm",
        "lora_A",
        "lora_B",
    }
    for name in ("one", "two"):
        merge(place / "base", place / name, out=place / f"{name}-merged")
    one, two = (load_file(place / f"{name}-merged/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4)
    one, two = (json.loads((place / f"{name}.json").read_text())[name] for name in ("one", "two"))
    assert one["trainable_parameters"] == two["trainable_parameters"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("env", "changes"),
    [
        (zero(2), {}),
        (zero(2, offload=True, sequence=2), {"gradient_checkpointing": True}),
        (zero(3, offload=True, sequence=2), {"gradient_checkpointing": True, "loraplus_lr_ratio": 4.0}),
    ],
    ids=["2", "2-offload-sequence", "3-offload-sequence-two-rates"],
)
def test_every_stage_trains_what_one_process_does(place, env, changes):
    changes = {**EACH, "steps": 4, **changes}
    run(place, "one", **changes)
    together.run(2, train_here, place, "two", changes, **env)
    nearly_equal(place / "two", place / "one")


@needs_deepspeed
def test_in_bfloat16_the_trained_weights_stay_in_float32(place):
    changes = {**EACH, "dtype": "bfloat16"}
    run(place, "one", **changes)
    together.run(2, train_here, place, "two", changes, **zero(3))
    nearly_equal(place / "two", place / "one", curve=2e-3, weight=6e-3)
    assert {t.dtype for t in load_file(place / "two/adapter_model.safetensors").values()} == {torch.float32}


@needs_deepspeed
def test_a_killed_run_resumes_under_any_stage_and_number_of_processes(place):
    changes = {"global_batch_size": 6, "micro_batch_size": 1}
    together.run(2, train_here, place, "whole", changes, **zero(3))
    codes = together.ended(together.start(2, killed_at_five, place, "resumed", changes, **zero(3)))
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    shutil.copytree(place / "checkpoints", place / "kept")
    for name, count, env in (("same", 2, zero(3)), ("other", 3, zero(2)), ("alone", 1, None)):
        shutil.rmtree(place / "checkpoints")
        shutil.copytree(place / "kept", place / "checkpoints")
        assert [f.name for f in (place / "checkpoints").rglob("checkpoint-*")] == ["checkpoint-4"]
        if env:
            together.run(count, train_here, place, name, changes, **env)
        else:
            run(place, name, **changes)
        nearly_equal(place / name, place / "whole")
    assert weights(place / "same") == weights(place / "whole")


@needs_deepspeed
def test_a_checkpoint_of_one_process_resumes_in_unequal_parts(place, monkeypatch):
    """Of three processes the last has less of a tensor than the others."""
    changes = {"global_batch_size": 3, "micro_batch_size": 1}
    run(place, "whole", **changes)
    step = LongTrainer.training_step

    def broken_off(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LongTrainer, "training_step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run(place, "resumed", **changes)
    together.run(3, train_here, place, "resumed", changes, **zero(3))
    nearly_equal(place / "resumed", place / "whole")


def keeps_here(place: Path, changes: dict) -> None:
    """Train, and note how many whole tensors this process is given for its checkpoints."""
    kept: list[int] = []
    for name in ("whole_parameters", "whole_adam"):

        def noted(self, real=getattr(LongTrainer, name)):
            found = real(self)
            kept.append(len(found))
            return found

        setattr(LongTrainer, name, noted)
    train_here(place, "two", changes)
    assert kept
    assert all((count > 0) == (os.environ["RANK"] == "0") for count in kept), kept


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_only_the_process_that_saves_keeps_whole_tensors(place, stage):
    together.run(2, keeps_here, place, {**EACH, "steps": 2}, **zero(stage))


def numbers(config: object) -> list[object]:
    if isinstance(config, dict):
        return [n for value in config.values() for n in numbers(value)]
    return [config] if isinstance(config, int | float) and not isinstance(config, bool) else []


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configuration_says_no_number_that_the_parameters_say(stage):
    assert numbers(Zero(stage, offload=True).config(dtype="bfloat16")) == [stage]


@pytest.mark.parametrize(("stage", "offload"), [("1", "0"), ("3", "yes"), ("three", "")])
def test_a_stage_that_does_not_exist_is_refused(monkeypatch, stage, offload):
    monkeypatch.setenv("LONGLORA_ZERO", stage)
    monkeypatch.setenv("LONGLORA_ZERO_OFFLOAD", offload)
    with pytest.raises(ValueError, match="must be 2, 3 or unset"):
        zero_from_environment()


def test_an_optimiser_is_laid_off_under_zero_alone(monkeypatch):
    monkeypatch.delenv("LONGLORA_ZERO", raising=False)
    monkeypatch.setenv("LONGLORA_ZERO_OFFLOAD", "1")
    with pytest.raises(ValueError, match="^LONGLORA_ZERO_OFFLOAD = 1 lays .* set LONGLORA_ZERO to 2 or 3$"):
        zero_from_environment()


@needs_deepspeed
def test_without_a_launcher_its_stages_are_refused_in_one_line_that_names_one(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LONGLORA_ZERO", "2")
    with pytest.raises(
        ValueError, match=r'^LONGLORA_ZERO = 2 needs .* LONGLORA_LAUNCHER="torchrun --nproc-per-node 1"$'
    ):
        zero_from_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert zero_from_environment() == Zero(2, offload=False)


def documented() -> list[str]:
    """docs/gpus.md's own launcher of DeepSpeed, as words."""
    (said,) = re.findall(r'^LONGLORA_LAUNCHER="(deepspeed .*?)"', (ROOT / "docs/gpus.md").read_text(), re.M)
    return shlex.split(said)


@needs_deepspeed
def test_deepspeeds_launcher_takes_the_words_that_are_documented():
    from deepspeed.launcher.runner import parse_args

    command = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["fit"]["cmd"].replace("\\${", "${")
    place, *tail = shlex.split(command)
    assert place == "${LONGLORA_LAUNCHER:-python}"
    said = parse_args([*documented()[1:], *tail])
    assert (said.no_local_rank, said.no_python, Path(said.user_script).name) == (True, True, "python")
    assert said.user_args == tail
    assert said.user_args[:2] == ["-m", "longlora.stages.fit"]


@needs_deepspeed
def test_the_stage_runs_under_deepspeeds_launcher(place):
    """As documented, but for ssh: one machine, of two processes."""
    (place / "hostfile").write_text("localhost slots=2\n")
    here = {"$PWD/hostfile": str(place / "hostfile"), "$PWD/.venv/bin/python": sys.executable}
    program, *words = [here.get(word, word) for word in documented()]
    alone = ["--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={together.free_port()}"]
    the_stage_trains_what_one_process_does(
        place, [str(Path(sys.executable).with_name(program)), *alone, *words], env=zero(2), **EACH
    )


def test_without_deepspeed_its_stages_are_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("LONGLORA_ZERO", "3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^LONGLORA_ZERO = 3 needs DeepSpeed: pip install .*\[deepspeed\]'$"):
        zero_from_environment()
    monkeypatch.delenv("LONGLORA_ZERO")
    assert os.environ.get("LONGLORA_ZERO") is None
    assert zero_from_environment() is None
