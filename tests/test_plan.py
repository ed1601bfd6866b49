"""The plan is held to the paper's tables, to autograd and the memory profiler on a small Llama, and to itself."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from flows.memory import refusal
from longlora.attention.groups import group_size
from longlora.attention.kernels import BackendName
from longlora.model.adapter import Adapter, attach
from longlora.model.position import Method
from longlora.planning import cost, hardware, plan
from longlora.planning.activations import activations, layer_bytes
from longlora.planning.cost import LIKE_LLAMA, Shape, Workload, forward_flops, trained_parameters
from longlora.planning.hardware import GPUS, Hardware, memory
from longlora.planning.plan import estimate, ladder, lines, shape_named, span, workload_from_params
from longlora.section import read_params
from longlora.training.loss import chunk_loss
from longlora.training.tile import tile_mlp

ROOT = Path(__file__).parent.parent
CONFIGS = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes/shapes.yaml"))
LLAMA = shape_named("meta-llama/Llama-2-7b-hf", configs=CONFIGS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

METHODS = {
    "full": {"method": "full", "pattern": "full"},
    "LoRA": {"method": "lora", "pattern": "full"},
    "LongLoRA": {"method": "lora", "pattern": "s2"},
}
# Table 12: 1000 steps of 7B on 8 x A100-80GB, hours and GB per GPU; None is out of memory.
HOURS = {
    ("full", 8192): 7.4,
    ("full", 16384): 16.3,
    ("full", 32768): 39.8,
    ("full", 65536): None,
    ("LoRA", 8192): 6.0,
    ("LoRA", 16384): 14.0,
    ("LoRA", 32768): 36.5,
    ("LoRA", 65536): 92.5,
    ("LongLoRA", 8192): 5.2,
    ("LongLoRA", 16384): 11.3,
    ("LongLoRA", 32768): 24.6,
    ("LongLoRA", 65536): 52.4,
}
GB = {
    ("full", 8192): 46.3,
    ("full", 16384): 57.4,
    ("full", 32768): 68.8,
    ("full", 65536): None,
    ("LoRA", 8192): 25.7,
    ("LoRA", 16384): 34.7,
    ("LoRA", 32768): 46.5,
    ("LoRA", 65536): 71.1,
    ("LongLoRA", 8192): 25.6,
    ("LongLoRA", 16384): 34.6,
    ("LongLoRA", 32768): 46.4,
    ("LongLoRA", 65536): 69.8,
}
MEASURED = [cell for cell, hours in HOURS.items() if hours is not None]
FITTED = [(method, context) for method, context in MEASURED if context in (8192, 65536)]


def workload(**fields) -> Workload:
    """The paper's recipe: no chunked loss, everything else as the authors ran it."""
    paper = {
        "context": 8192,
        "steps": 1000,
        "global_batch_size": 64,
        "micro_batch_size": 1,
        "pattern": "s2",
        "group_ratio": 0.25,
        "shift": "boundaries",
        "scaling": "linear",
        "full_attention_last": 0.0,
        "backend": "auto",
        "method": "lora",
        "quantized": None,
        "rank": 8,
        "target_modules": ATTENTION,
        "trainable": ("embeddings", "norms"),
        "gradient_checkpointing": True,
        "loss_chunk": None,
        "mlp_tile": None,
        "dtype": "bfloat16",
    }
    return Workload(**{**paper, **fields})


def node(**fields) -> Hardware:
    """The paper's node, and its program, which keeps trained weights in 16 bit."""
    return Hardware.of("A100-80GB", **{"gpus": 8, "zero": 2, "half_weights": True, **fields})


def table_12(method: str, context: int) -> plan.Estimate:
    return estimate(LLAMA, workload(context=context, **METHODS[method]), node())


# The paper's tables


@pytest.mark.parametrize(
    ("context", "full", "s2"),
    [(8192, 143.5, 117.1), (16384, 357.2, 251.7), (32768, 996.0, 573.8), (65536, 3118.0, 1429.1)],
)
def test_forward_flops_are_those_of_table_11(context, full, s2):
    d, n, f, v = 4096, 32, 11008, 32000
    expected = {
        "attention": 4 * context**2 * d * n,
        "projections": 8 * context * d**2 * n,
        "ffn": 6 * context * d * f * n,
        "other": 2 * context * d * v,
    }
    for pattern, total, share in (("full", full, 1), ("s2", s2, 0.25)):
        flops = forward_flops(LLAMA, workload=workload(context=context, pattern=pattern)).model_dump()
        assert flops["total"] == pytest.approx(total * 1e12, rel=0.005)
        assert flops["attention"] == pytest.approx(expected["attention"] * share, rel=1e-9)
        assert {part: flops[part] for part in ("projections", "ffn", "other")} == pytest.approx(
            {part: expected[part] for part in ("projections", "ffn", "other")}, rel=1e-9
        )


@pytest.mark.parametrize(("method", "context"), MEASURED)
def test_hours_are_within_a_tenth_of_table_12(method, context):
    assert table_12(method, context).hours == pytest.approx(HOURS[method, context], rel=0.10)


@pytest.mark.parametrize(("method", "context"), MEASURED)
def test_memory_is_within_15_percent_of_table_12_and_fits(method, context):
    found = table_12(method, context)
    assert found.gb_per_gpu == pytest.approx(GB[method, context], rel=0.15)
    assert found.fits


def test_full_fine_tuning_at_65536_is_out_of_memory_as_in_table_12():
    assert HOURS["full", 65536] is None
    assert not table_12("full", 65536).fits


@pytest.mark.parametrize(
    ("pattern", "context", "gb"), [("full", 8192, 55.5), ("full", 16384, None), ("s2", 8192, 30.3), ("s2", 16384, 57.1)]
)
def test_memory_without_a_fused_kernel_is_that_of_table_13_with_nothing_fitted_on_it(pattern, context, gb):
    found = estimate(LLAMA, workload(pattern=pattern, context=context, backend="eager"), node())
    assert found.fits == (gb is not None)
    if gb is not None:
        assert found.gb_per_gpu == pytest.approx(gb, rel=0.15)


def least_squares(rows: list[list[float]]) -> np.ndarray:
    """x that makes every row . x nearest to 1: the smallest relative errors, squared."""
    return np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]


def test_the_rates_are_the_least_squares_of_the_fitted_cells():
    assert 2 * len(FITTED) <= len(MEASURED)
    rows = []
    for method, context in FITTED:
        flops = cost.step_flops(LLAMA, workload=workload(context=context, **METHODS[method]))
        peak_hours = [f * 64 * 1000 / 8 / (GPUS["A100-80GB"].tflops * 1e12) / 3600 for f in flops]
        rows.append([hours / HOURS[method, context] for hours in peak_hours])
    slow, fast = least_squares(rows)
    assert 1 / slow == pytest.approx(hardware.UTILISATION, rel=2e-3)
    assert slow / fast == pytest.approx(hardware.ATTENTION_SPEED, rel=2e-3)


@pytest.mark.parametrize(("gpu", "patterns"), [("H100-80GB", ("s2", "full")), ("H200", ("full",))])
def test_steps_that_were_measured_on_one_gpu_are_foretold(gpu, patterns):
    """One of them was fitted. On the H200, S2-Attn ran over another kernel than `auto` takes now."""
    file = ROOT / f"docs/gpu-{gpu.partition('-')[0].lower()}.json"
    measured = json.loads(file.read_text())["cases"]
    for pattern, context in itertools.product(patterns, (16384, 32768, 102400)):
        said = measured[f"step, {context} tokens, {pattern}"]
        work = workload(context=context, pattern=pattern, method="lora", steps=1, global_batch_size=1, loss_chunk=1024)
        alone = Hardware.of(gpu)
        assert hardware.step_seconds(LLAMA, workload=work, hardware=alone) == pytest.approx(said["seconds"], rel=0.03)
        held = memory(LLAMA, workload=work, hardware=alone)[0].total - hardware.ALONE_GB
        assert held * hardware.GB / 1e9 == pytest.approx(said["peak_gb"], rel=0.02)


def test_the_memory_constants_are_the_least_squares_of_the_fitted_cells():
    rows = []
    for method, context in FITTED:
        work, gb = workload(context=context, **METHODS[method]), GB[method, context]
        bare, _ = memory(LLAMA, workload=work, hardware=node(runtime_gb=0))
        copy = 2 * trained_parameters(LLAMA, workload=work) / 2**30
        left = gb - (bare.total - hardware.BUCKET_SHARE * copy)
        rows.append([1 / gb, copy / gb, left / gb])
    (runtime, share), *_ = np.linalg.lstsq(np.array(rows)[:, :2], np.array(rows)[:, 2], rcond=None)
    assert runtime == pytest.approx(hardware.RUNTIME_GB, rel=2e-3)
    assert share == pytest.approx(hardware.BUCKET_SHARE, rel=2e-3)


# The architecture


def test_trained_shares_of_llama_7b_are_the_papers():
    def trained(*kinds: str) -> int:
        return trained_parameters(LLAMA, workload=workload(trainable=kinds))

    assert trained() == 8_388_608
    assert trained("norms") - trained() == 266_240
    assert trained("embeddings") - trained() == 131_072_000
    assert trained_parameters(LLAMA, workload=workload(method="full")) == LLAMA.parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_known_models_have_their_known_number_of_parameters(name, parameters):
    assert shape_named(name, configs=CONFIGS).parameters == parameters


def test_every_known_model_is_counted():
    marks = test_known_models_have_their_known_number_of_parameters.pytestmark
    assert {name for name, _ in marks[0].args[1]} == CONFIGS.keys()


def test_fewer_key_value_heads_shrink_projections_and_memory_but_not_attention():
    wide, narrow = (
        Shape.from_config({**CONFIGS["mistralai/Mistral-7B-v0.1"], "num_key_value_heads": k}) for k in (32, 8)
    )
    work = workload(gradient_checkpointing=False)
    assert forward_flops(wide, workload=work).attention == forward_flops(narrow, workload=work).attention
    saved = 2 * 2 * 8192 * 4096 * (32 - 8) * 128 * 32  # k and v: a product of 2 FLOPs per weight and token, 32 layers
    wide_flops, narrow_flops = (forward_flops(shape, workload=work).projections for shape in (wide, narrow))
    assert wide_flops - narrow_flops == saved
    assert layer_bytes(wide, workload=work) - layer_bytes(narrow, workload=work) == 2 * 2 * (32 - 8) * 128


@pytest.mark.parametrize(("context", "ratio"), [(4097, 0.25), (8192, 0.25), (10, 0.7), (99, 1 / 3), (7, 1.0)])
def test_groups_are_those_of_the_attention_itself(context, ratio):
    assert workload(context=context, group_ratio=ratio).group == min(context, group_size(context, ratio))


# Activations, against autograd and the memory profiler

SMALL = LlamaConfig(
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    intermediate_size=280,
    vocab_size=1000,
    tie_word_embeddings=False,
)
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapter(work: Workload) -> Adapter:
    return Adapter(
        method=work.method,
        quantized=None,
        rank=work.rank,
        alpha=16.0,
        dropout=0.0,
        target_modules=list(work.target_modules),
        trainable=list(work.trainable),
    )


def small_model(work: Workload, *, layers: int, **sizes) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig.from_dict({**SMALL.to_dict(), "num_hidden_layers": layers, **sizes})
    dtype = getattr(torch, work.dtype)
    model = LlamaForCausalLM(config).to(dtype)
    if work.method == "lora":
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))
    model.config.use_cache = False
    adapted = attach(model, adapter(work))
    if work.mlp_tile:
        tile_mlp(model, tile=work.mlp_tile)
    if work.loss_chunk:
        chunk_loss(model, chunk=work.loss_chunk)
    if work.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def loss(model: torch.nn.Module, work: Workload) -> torch.Tensor:
    ids_BL = torch.arange(work.context)[None] % SMALL.vocab_size
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "bfloat16"):
        return model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{}, {"trainable": ("norms",)}, {"dtype": "float32"}, {"method": "full"}], ids=str)
def test_weights_are_those_that_a_process_holds_frozen_originals_included(tied, fields):
    work = workload(**fields)
    model = LlamaForCausalLM(LlamaConfig.from_dict({**SMALL.to_dict(), "tie_word_embeddings": tied}))
    adapted = attach(model.to(getattr(torch, work.dtype)), adapter(work))
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in adapted.parameters()}
    shape, alone = Shape.from_config(model.config.to_dict()), Hardware.of("A100-80GB")
    assert hardware.weight_bytes(shape, workload=work, hardware=alone) == sum(held.values())


def saved_bytes(work: Workload, *, layers: int) -> int:
    """What autograd keeps for the backward of one step, parameters apart."""
    model = small_model(work, layers=layers)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = loss(model, work)
    del held
    return sum(kept.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "trainable": ()},
        {"dtype": "float32", "target_modules": EVERY},
        {"dtype": "float32", "target_modules": ("q_proj", "down_proj"), "rank": 5},
        {"dtype": "float32", "method": "full"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "target_modules": EVERY},
    ],
    ids=str,
)
def test_a_layer_saves_what_autograd_saves(fields):
    work = workload(context=256, pattern="full", gradient_checkpointing=False, **fields)
    one, three = (saved_bytes(work, layers=layers) for layers in (1, 3))
    expected = layer_bytes(Shape.from_config(SMALL.to_dict()), workload=work)
    seen = (three - one) / 2 / work.context
    assert expected == pytest.approx(seen, rel=0.01 if work.dtype == "float32" else 0.03)


def estimated_peak(work: Workload) -> float:
    held = activations(Shape.from_config(SMALL.to_dict()), workload=work, tokens=work.context)
    return held.kept + max(held.layer, held.head + held.logits)


def peak_bytes(work: Workload, **sizes) -> int:
    """The highest point of a step, over what was there before it, by the profiler's record of every allocation.

    By one thread: the attention kernel of a CPU has room of its own for each, which is no part of the plan.
    """
    model, threads = small_model(work, layers=SMALL.num_hidden_layers, **sizes), torch.get_num_threads()
    torch.set_num_threads(1)
    loss(model, work).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        loss(model, work).backward()
    torch.set_num_threads(threads)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("chunk", [None, 128], ids=["plain", "chunked"])
@pytest.mark.parametrize("target_modules", [ATTENTION, EVERY], ids=["attention", "every"])
def test_a_steps_peak_is_what_the_profiler_sees_in_float32(checkpointing, chunk, target_modules):
    work = workload(
        context=1024,
        pattern="full",
        dtype="float32",
        gradient_checkpointing=checkpointing,
        loss_chunk=chunk,
        target_modules=target_modules,
    )
    assert estimated_peak(work) == pytest.approx(peak_bytes(work), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("tile", [64, 256, 512])
@pytest.mark.parametrize("target_modules", [ATTENTION, EVERY], ids=["attention", "every"])
def test_a_peak_in_tiles_is_not_too_low_and_at_most_a_tenth_too_high(checkpointing, tile, target_modules):
    work = workload(
        context=1024,
        pattern="full",
        dtype="float32",
        gradient_checkpointing=checkpointing,
        loss_chunk=128,
        mlp_tile=tile,
        target_modules=target_modules,
    )
    assert 1 <= estimated_peak(work) / peak_bytes(work) < 1.1


@pytest.mark.parametrize("tied", [False, True])
def test_an_embeddings_gradient_is_made_when_the_rest_has_gone_unless_it_is_the_heads(tied):
    """A large vocabulary, of which the loss takes few words at once."""
    work = workload(context=1024, pattern="full", dtype="float32", loss_chunk=16)
    sizes = {"vocab_size": 16000, "tie_word_embeddings": tied}
    shape, alone = Shape.from_config({**SMALL.to_dict(), **sizes}), Hardware.of("A100-80GB", runtime_gb=0)
    said = memory(shape, workload=work, hardware=alone)[0]
    over = (said.activations + said.logits + said.buffers) * hardware.GB
    assert over == pytest.approx(peak_bytes(work, **sizes), rel=0.05)


def test_trained_in_full_under_autocast_checkpoints_are_kept_in_float32():
    work = workload(context=256, pattern="full", method="full")
    one, three = (saved_bytes(work, layers=layers) for layers in (1, 3))
    shape = Shape.from_config(SMALL.to_dict())
    assert activations(shape, workload=work, tokens=256).kept == (three - one) / 2 * shape.layers
    open_work = work.model_copy(update={"gradient_checkpointing": False})
    one, three = (saved_bytes(open_work, layers=layers) for layers in (1, 3))
    copies = 2 * sum(width * out for width, out in shape.linears.values())  # of the weights, in 16 bit
    expected = activations(shape, workload=open_work, tokens=256).kept / shape.layers
    assert expected == pytest.approx((three - one) / 2 - copies, rel=0.01)


def test_under_zero_trained_weights_are_planned_in_float32_as_they_are_kept():
    """4 bytes, gradient 4, DeepSpeed's copy and the moments 12: counted in two processes of tests/test_zero.py's kind."""
    work, size = workload(method="full", context=16384), LLAMA.parameters / 2**30
    ours, papers = (estimate(LLAMA, work, node(half_weights=half)) for half in (False, True))
    parts = ours.gb_parts
    assert (parts.parameters, parts.gradients, parts.optimiser) == pytest.approx((4 * size, size / 2, 12 * size / 8))
    assert papers.fits and not ours.fits
    assert ours.gb_parts.buffers - papers.gb_parts.buffers > 2 * size  # autocast's copies


def test_zero_3_does_not_start_from_a_model_that_no_gpu_holds_whole():
    large = shape_named("meta-llama/Llama-2-70b-hf", configs=CONFIGS)
    work = workload(context=32768, loss_chunk=1024)
    found = estimate(large, work, node(half_weights=False, zero=3, sequence_parallel=2))
    assert found.gb_per_gpu < found.hardware.memory_gb
    assert not found.fits
    assert any("ZeRO-3 starts from a model that each GPU holds whole" in note for note in found.notes)
    assert found.remedy.changes == ("adapter.quantized=nf4", "ZeRO stage 2")  # which starts from no whole model
    in_four = work.model_copy(update={"quantized": "nf4"})
    again = estimate(large, in_four, node(half_weights=False, zero=2, sequence_parallel=2))
    assert again.fits and again.gb_per_gpu == found.remedy.gb_per_gpu
    whole = estimate(large, work.model_copy(update={"method": "full"}), node(half_weights=False, zero=3))
    assert whole.remedy is None and "nothing short of larger GPUs, or a smaller model" in "\n".join(plan.lines(whole))
    assert f"needs about {found.gb_at_start:.1f} GB" in refusal(found, large)
    assert estimate(LLAMA, work, node(half_weights=False, zero=3)).fits


# Laws of the plan


def gb(work: Workload, machine: Hardware) -> float:
    return memory(LLAMA, workload=work, hardware=machine)[0].total


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_zero_stage_takes_less_memory_than_the_one_before(method):
    work = workload(method=method, loss_chunk=1024)
    sizes = [gb(work, node(zero=zero)) for zero in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_memory_and_hours_grow_with_context_batch_and_what_is_trained():
    base = estimate(LLAMA, workload(), node())
    for fields in ({"context": 16384}, {"micro_batch_size": 2}, {"rank": 64}, {"method": "full"}):
        assert estimate(LLAMA, workload(**fields), node()).gb_per_gpu > base.gb_per_gpu, fields
    for fields in (
        {"context": 16384},
        {"global_batch_size": 128},
        {"steps": 1001},
        {"group_ratio": 0.5},
        {"method": "full"},
    ):
        assert estimate(LLAMA, workload(**fields), node()).hours > base.hours, fields


def test_tiles_of_the_feed_forward_trade_hours_for_memory():
    without, with_it = (
        estimate(LLAMA, workload(context=65536, loss_chunk=1024, mlp_tile=tile), node()) for tile in (None, 4096)
    )
    assert with_it.gb_per_gpu < without.gb_per_gpu
    assert without.hours < with_it.hours < 1.3 * without.hours


def test_checkpointing_trades_hours_for_memory():
    without, with_it = (estimate(LLAMA, workload(gradient_checkpointing=on), node()) for on in (False, True))
    assert with_it.gb_per_gpu < without.gb_per_gpu
    assert with_it.hours > without.hours


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_sequence_parallelism_divides_activations_and_leaves_the_hours(degree):
    work = workload(context=65536, pattern="full")
    alone, shared = (estimate(LLAMA, work, node(sequence_parallel=p)) for p in (1, degree))
    for part in ("activations", "logits"):
        assert getattr(shared.gb_parts, part) == pytest.approx(getattr(alone.gb_parts, part) / degree)
    assert shared.gb_parts.parameters == alone.gb_parts.parameters
    assert shared.hours == pytest.approx(alone.hours)


def test_a_last_share_of_full_attention_costs_between_the_two_patterns():
    s2, mixed, full = (
        estimate(LLAMA, workload(context=65536, **fields), node()).hours
        for fields in ({}, {"full_attention_last": 0.25}, {"pattern": "full"})
    )
    assert mixed == pytest.approx(0.75 * s2 + 0.25 * full)


def test_one_group_is_full_attention():
    one = estimate(LLAMA, workload(group_ratio=1.0), node())
    full = estimate(LLAMA, workload(pattern="full"), node())
    assert (one.flops_forward, one.hours, one.gb_per_gpu) == (full.flops_forward, full.hours, full.gb_per_gpu)


def test_offload_moves_memory_to_the_host_and_adds_hours():
    work = workload(method="full", context=16384)
    here, away = (estimate(LLAMA, work, node(offload_optimizer=on)) for on in (False, True))
    moved = here.gb_parts.optimiser + here.gb_parts.gradients
    assert here.gb_per_gpu - away.gb_per_gpu == pytest.approx(moved)
    assert away.gb_on_host - here.gb_on_host == pytest.approx(8 * moved)
    assert away.hours > here.hours


def test_parts_add_up_and_price_is_per_gpu_and_hour():
    found = estimate(LLAMA, workload(steps=777), node(price=2.5))
    parts = found.gb_parts.model_dump()
    assert found.gb_per_gpu == pytest.approx(sum(size for part, size in parts.items() if part != "total"))
    assert found.cost == pytest.approx(found.hours * 8 * 2.5)
    assert found.tokens_per_second * found.hours * 3600 == pytest.approx(777 * 64 * 8192)
    assert estimate(LLAMA, workload(), node()).cost is None


# What would make it fit


def test_the_remedy_is_the_single_change_with_the_fewest_hours():
    work = workload(context=65536, gradient_checkpointing=False)
    found = estimate(LLAMA, work, node())
    assert not found.fits
    rungs = plan.ladder(LLAMA, work, node())
    alone = [estimate(LLAMA, *plan.changed(work, node(), [rung])) for rung in rungs]
    fitting = [(e.hours, rung.words) for e, rung in zip(alone, rungs, strict=True) if e.fits]
    assert len(fitting) > 1
    assert found.remedy.changes == (min(fitting)[1],)


def test_the_remedy_says_what_an_estimate_of_the_changed_run_says():
    found = table_12("full", 65536)
    by_name = {rung.words: rung for rung in plan.ladder(LLAMA, found.workload, found.hardware)}
    after = plan.changed(found.workload, found.hardware, [by_name[words] for words in found.remedy.changes])
    again = estimate(LLAMA, *after)
    assert again.fits
    assert (again.gb_per_gpu, again.hours) == (found.remedy.gb_per_gpu, found.remedy.hours)


def test_changes_are_combined_only_where_none_suffices_and_none_is_idle():
    work, machine = workload(method="full", context=65536, gradient_checkpointing=False), node(zero=0)
    found = estimate(LLAMA, work, machine)
    by_name = {rung.words: rung for rung in plan.ladder(LLAMA, work, machine)}
    taken = [by_name[words] for words in found.remedy.changes]
    assert len(taken) > 1
    for rung in by_name.values():
        assert not estimate(LLAMA, *plan.changed(work, machine, [rung])).fits
    for rung in taken:
        assert not estimate(LLAMA, *plan.changed(work, machine, [r for r in taken if r is not rung])).fits


@pytest.mark.parametrize("fields", [{"method": "full"}, {"quantized": "nf4"}], ids=str)
def test_four_bits_are_proposed_only_where_nothing_else_helps_and_the_recipe_takes_them(fields):
    """On one GPU: 70B in 16 bit fits by no change, in four bits it does."""
    large, alone = shape_named("meta-llama/Llama-2-70b-hf", configs=CONFIGS), Hardware.of("A100-80GB")
    work = workload(context=32768, loss_chunk=1024)
    assert estimate(large, work, alone).remedy.changes == ("adapter.quantized=nf4", "fit.activation_offloading=true")
    found = estimate(LLAMA, workload(context=65536), Hardware.of("A100-40GB"))
    assert found.remedy and not any("nf4" in change for change in found.remedy.changes)
    small = Hardware.of("small", memory_gb=20, tflops=10)
    assert estimate(large, work.model_copy(update=fields), small).remedy is None


def test_where_nothing_helps_no_remedy_is_named():
    found = estimate(LLAMA, workload(), Hardware.of("small", memory_gb=1, tflops=10))
    assert not found.fits
    assert found.remedy is None
    assert any("nothing short of" in line for line in lines(found))


def test_the_ladder_keeps_the_groups_of_a_shared_sequence_whole():
    offered = [
        c.hardware["sequence_parallel"]
        for c in plan.ladder(LLAMA, workload(), node())
        if "sequence_parallel" in c.hardware
    ]
    assert offered == [2, 4]
    whole = plan.ladder(LLAMA, workload(pattern="full"), node())
    assert [c.hardware["sequence_parallel"] for c in whole if "sequence_parallel" in c.hardware] == [2, 4, 8]


GROUPED = Shape.from_config({**CONFIGS["meta-llama/Llama-2-7b-hf"], "num_key_value_heads": 2})


@pytest.mark.parametrize("fields", [{"full_attention_last": 0.1}, {"pattern": "full"}], ids=str)
def test_key_value_heads_that_full_attention_can_not_share_out_are_refused_and_not_offered(fields):
    """Though full attention come only in the last steps."""
    said = "shares 2 key/value heads out to 4 processes: .* must divide 2, the nearest is 2; or train in s2 alone"
    with pytest.raises(ValueError, match=said):
        estimate(GROUPED, workload(**fields), node(sequence_parallel=4))
    rungs = plan.ladder(GROUPED, workload(**fields), node())
    assert [c.hardware["sequence_parallel"] for c in rungs if "sequence_parallel" in c.hardware] == [2]
    estimate(GROUPED, workload(), node(sequence_parallel=4))  # s2 to the end shares no heads out


def test_four_bits_are_not_planned_under_zero_3_which_the_training_refuses():
    four = workload(quantized="nf4")
    with pytest.raises(ValueError, match="adapter.quantized: ZeRO-3"):
        estimate(LLAMA, four, node(zero=3))
    assert not any("ZeRO stage 3" in rung.words for rung in plan.ladder(LLAMA, four, node()))


# At the door


def params() -> dict:
    return read_params(ROOT / "params.yaml")


def test_params_yaml_gives_a_workload_of_its_own_numbers():
    given, work = params(), workload_from_params(params())
    for field, place in plan.KEYS.items():
        section, key = place.split(".")
        value = given[section][key]
        assert getattr(work, field) == (tuple(value) if isinstance(value, list) else value)
    assert plan.KEYS.keys() == Workload.model_fields.keys()


@pytest.mark.parametrize(
    "recipe", [r for r in sorted((ROOT / "recipes").glob("*.yaml")) if r.stem != "shapes"], ids=str
)
def test_every_recipe_of_a_hub_model_can_be_planned(recipe):
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(recipe)))
    work = workload_from_params(merged)
    if merged["backbone"]["source"] == "hub":
        assert estimate(shape_named(merged["backbone"]["name"], configs=CONFIGS), work, node()).hours > 0


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("fit", "steps", None, "missing 'fit.steps'"),
        ("attention", None, None, "missing 'attention.pattern', 'attention.group_ratio'"),
        ("fit", "steps", 0, "fit.steps = 0"),
        ("fit", "dtype", "float8", "fit.dtype = 'float8'"),
        ("adapter", "rank", -3, "adapter.rank = -3"),
        ("attention", "backend", "flesh", "no attention.backend 'flesh'; did you mean 'flash'"),
        ("attention", "backend", "eager", "no attention.backend 'eager'; there are: auto, sdpa"),
        ("position", "method", "yran", "no position.method 'yran'; did you mean 'yarn'"),
    ],
)
def test_a_bad_or_missing_key_is_named(section, key, value, words):
    given = params()
    if key is None:
        del given[section]
    elif value is None:
        del given[section][key]
    else:
        given[section][key] = value
    with pytest.raises(ValueError, match=words):
        workload_from_params(given)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context": 1}, "position.context = 1: .* at least 2 tokens"),
        ({"group_ratio": 2.0}, "group of 16384 tokens is larger than the sequence of 8192"),
        ({"group_ratio": 0.0}, "share in"),
        ({"target_modules": ("q_proj", "v_porj")}, "'v_porj'; did you mean 'v_proj'"),
        ({"global_batch_size": 60}, "60 must be a multiple of micro_batch_size x replicas = 1 x 8; the nearest is 64"),
        ({"micro_batch_size": 3}, "64 must be a multiple of micro_batch_size x replicas = 3 x 8; the nearest is 72"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        estimate(LLAMA, workload(**fields), node())


def test_a_context_that_the_gpus_can_not_share_is_refused():
    with pytest.raises(
        ValueError, match="8190 must be a multiple of the sequence-parallel degree 4; the nearest is 8192"
    ):
        estimate(LLAMA, workload(context=8190), node(sequence_parallel=4))


def test_a_group_that_the_gpus_of_a_sequence_would_break_is_refused_as_the_training_refuses_it():
    with pytest.raises(ValueError, match="1024 each, which must be a multiple of the group, 2048: .* can be 1, 2, 4$"):
        estimate(LLAMA, workload(context=8192), node(sequence_parallel=8))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scaling": "longrope"}, "position.method: longrope turns tokens by the length of their text"),
        ({"scaling": "dynamic"}, "position.method: dynamic turns"),
        ({"shift": "roll"}, "a roll mixes the end of the sequence with its start"),
    ],
)
def test_what_no_processes_can_share_is_refused_as_the_training_refuses_it_and_not_proposed(fields, said):
    with pytest.raises(ValueError, match=said):
        estimate(LLAMA, workload(**fields), node(sequence_parallel=2))
    small = node(memory_gb=20.0)
    degrees = {"sequence-parallel degree 2", "sequence-parallel degree 4"}
    assert degrees <= {rung.words for rung in ladder(LLAMA, workload(), small)}
    assert not degrees & {rung.words for rung in ladder(LLAMA, workload(**fields), small)}


def test_a_roll_that_breaks_a_group_is_refused_before_the_training_would_refuse_it():
    with pytest.raises(ValueError, match="roll needs whole groups, and 8190 tokens are no multiple of the group, 2048"):
        estimate(LLAMA, workload(context=8190, shift="roll"), node())
    for fields in ({}, {"group_ratio": 1.0}, {"pattern": "full", "context": 8190}):
        estimate(LLAMA, workload(**{"shift": "roll", **fields}), node())


def test_the_plan_takes_the_words_that_a_run_takes():
    assert {"backend": get_args(BackendName), "scaling": get_args(Method)} == plan.CHOICES


def test_how_close_it_is_goes_by_all_that_must_fit():
    large = shape_named("meta-llama/Llama-2-70b-hf", configs=CONFIGS)
    work, laid = workload(context=32768, loss_chunk=1024), {"zero": 3, "sequence_parallel": 2, "half_weights": False}
    whole = estimate(large, work, node(**laid)).gb_at_start
    for share, close in ((1.05, True), (2.0, False)):
        found = estimate(large, work, node(**laid, memory_gb=share * whole))
        assert found.gb_per_gpu < whole
        assert found.close == close == any("the estimate's own error" in note for note in found.notes)


def test_s2_needs_two_heads():
    one = Shape.from_config({**CONFIGS["meta-llama/Llama-2-7b-hf"], "num_attention_heads": 1, "num_key_value_heads": 1})
    with pytest.raises(ValueError, match="half the heads, the model has 1"):
        estimate(one, workload(), node())


@pytest.mark.parametrize(
    ("gpu", "fields", "words"),
    [
        ("A100-80", {}, "unknown GPU 'A100-80'; did you mean 'A100-80GB'"),
        ("h100", {}, "unknown GPU 'h100'; did you mean 'H100-80GB'"),
        ("h100-80gb", {}, "did you mean 'H100-80GB'"),
        ("H10", {}, "unknown GPU 'H10'; did you mean 'H100-80GB'"),
        ("A100", {}, "did you mean 'A100-40GB' or 'A100-80GB'"),
        ("RTX", {"memory_gb": 24}, "give memory_gb and tflops"),
        ("XYZ", {}, r"^unknown GPU 'XYZ'; there are: [\w, -]+$"),
        ("H200", {"gpus": 8, "sequence_parallel": 3}, r"degree 3 must divide the 8 GPUs: one of \[1, 2, 4, 8\]"),
        ("H200", {"gpus": 0}, "hardware.gpus = 0"),
        ("H200", {"zero": 4}, "hardware.zero = 4"),
        ("H200", {"zeor": 2}, "unknown key 'hardware.zeor'; did you mean 'zero'?"),
        ("H200", {"utilisation": 1.5}, "hardware.utilisation = 1.5"),
        ("H200", {"price": -1}, "hardware.price = -1"),
        ("H200", {"offload_optimizer": True}, "from ZeRO stage 1 on, and the stage is 0"),
    ],
)
def test_hardware_that_contradicts_itself_is_refused(gpu, fields, words):
    with pytest.raises(ValueError, match=words):
        Hardware.of(gpu, **fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "not mixtral"),
        ({"model_type": "gpt_neox"}, "not gpt_neox"),
        ({"model_type": "starcoder2"}, "not starcoder2"),  # two matrices in the feed-forward
        ({"model_type": "falcon_h1"}, "not falcon_h1"),  # a state space beside the attention
        ({"model_type": "minicpm3"}, "not minicpm3"),  # latent attention
        ({"model_type": "ernie4_5_moe"}, "not ernie4_5_moe"),  # experts by another name
    ],
)
def test_architectures_the_plan_does_not_know_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Shape.from_config({**CONFIGS["meta-llama/Llama-2-7b-hf"], **changes})


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_a_family_has_the_parameters_and_the_matrices_that_the_plan_says(family):
    sizes = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
    config = CONFIG_MAPPING[family](**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    config.head_dim = 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    said = {
        key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"
    }  # which hubs leave out
    shape = Shape.from_config(said)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)
    linears = {
        name.rpartition(".")[2] for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert shape.targets.keys() == linears


@pytest.mark.parametrize("targets", [["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]])
def test_adapters_of_fused_matrices_are_counted_as_peft_makes_them(targets):
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    fields = {"method": "lora", "quantized": None, "rank": 8, "alpha": 16.0, "dropout": 0.0, "trainable": ["norms"]}
    adapted = attach(model, Adapter(**fields, target_modules=targets))
    work = workload(rank=8, target_modules=tuple(targets), trainable=("norms",), context=512)
    shape = Shape.from_config(model.config.to_dict())
    assert trained_parameters(shape, workload=work) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    estimate(shape, work, node())
    with pytest.raises(ValueError, match="no matrix 'q_proj'; did you mean 'qkv_proj'"):
        estimate(shape, work.model_copy(update={"target_modules": ("q_proj",)}), node())


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'Qwen/Qwen3-8B'"):
        shape_named("Qwen/Qwen3-8b", configs=CONFIGS)


def test_the_estimate_goes_through_json_and_says_it_in_lines():
    found = table_12("full", 65536)
    said = json.loads(json.dumps(found.model_dump()))
    assert {"hours", "gb_per_gpu", "fits"} <= said.keys()
    assert said["flops_forward"].keys() == {"attention", "projections", "ffn", "other", "total"}
    assert math.isclose(
        sum(v for k, v in said["flops_forward"].items() if k != "total"), said["flops_forward"]["total"]
    )
    text = "\n".join(lines(found))
    for words in ("does not fit", f"{found.gb_per_gpu:.1f} of 79.1 GB", found.remedy.changes[0]):
        assert words in text


def test_planning_loads_no_torch():
    command = "import sys, longlora.planning.plan; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_nf4_takes_its_bits_for_the_frozen_layers_and_leaves_all_else():
    plain, four = (
        memory(LLAMA, workload=workload(quantized=quantized), hardware=node())[0] for quantized in (None, "nf4")
    )
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plain.parameters - four.parameters == pytest.approx(linears * (2 - 4.127 / 8) / 2**30, rel=1e-3)
    assert plain.model_copy(update={"parameters": four.parameters}) == four
    alone = Hardware.of("A100-40GB")
    grown = memory(LLAMA, workload=workload(quantized="nf4"), hardware=alone)[0].buffers
    grown -= memory(LLAMA, workload=workload(), hardware=alone)[0].buffers
    assert grown == pytest.approx(4096 * 11008 * 2 / 2**30)  # the layer at work, in 16 bits


@pytest.mark.parametrize(
    ("hours", "said"), [(23.46, "23.5 h"), (0.96, "1.0 h"), (0.5, "30.0 min"), (0.0001, "0.006 min")]
)
def test_a_short_time_is_not_said_to_be_none(hours, said):
    assert span(hours) == said
