"""QLoRA: the frozen layers are the paper's NF4, training on them works as ever, and the adapter goes onto the base in full."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from scipy.stats import norm
from specimens import ADAPTER, POSITION, folder
from training import cut_off, history, run, weights
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.model.adapter import Adapter
from longlora.model.merge import merge
from longlora.model.quantized import device_map, nf4
from longlora.parallel.zero import Zero
from longlora.planning.hardware import NF4_BITS
from longlora.section import section_of
from longlora.training import fit as module
from longlora.training.fit import build

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QLORA = ADAPTER.model_copy(update={"quantized": "nf4"})
BLOCK = 64


def levels() -> np.ndarray:
    """NF4's sixteen, from the quantiles of the normal distribution (QLoRA, section 3): eight positive, seven negative, zero."""
    edge = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = norm.ppf(np.linspace(edge, 0.5, 9)[:-1]), norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    return np.sort(np.concatenate([positive, [0.0], -negative])) / positive.max()


def rounded(weight: torch.Tensor) -> np.ndarray:
    """Each block of 64 weights at its nearest levels, under its largest weight."""
    flat = weight.detach().double().numpy().ravel()
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True)
    near = np.abs((blocks / scale)[..., None] - levels()).argmin(-1)
    return (levels()[near] * scale).ravel()[: len(flat)].reshape(weight.shape)


def test_frozen_layers_are_nf4_and_all_else_is_as_it_was(tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base = AutoModelForCausalLM.from_pretrained(folder(tmp_path / "base"))
    model = build(tmp_path / "base", position=POSITION, adapter=QLORA, dtype="float32")
    four = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(four) == 7 * 2
    names = {name.split("model.", 2)[-1].removesuffix(".base_layer"): m for name, m in four.items()}
    took = 0
    for name, layer in names.items():
        whole = base.get_submodule(f"model.{name.removeprefix('model.')}").weight
        read = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().numpy()
        # The scales are in eight bits, so a level may lie off by half of a 256th of the span of the scales.
        assert np.abs(read - rounded(whole)).max() < 0.01 * whole.abs().max().item(), name
        assert np.abs(rounded(whole) - whole.detach().numpy()).max() > 0.05 * whole.abs().max().item()  # it matters
        took += layer.weight.data.numel()
    assert took == pytest.approx(sum(m.in_features * m.out_features for m in names.values()) / 2, rel=0.02)
    assert 4.12 < NF4_BITS < 4.13
    plain = build(tmp_path / "base", position=POSITION, adapter=ADAPTER, dtype="float32")
    trained = [{n: (p.dtype, p.shape) for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain)]
    assert trained[0] == trained[1]


def test_training_on_them_learns_repeats_and_resumes_bit_for_bit(place, monkeypatch):
    wanted = weights(run(place, "one", adapter=QLORA, steps=12))
    losses = [row["loss"] for row in history(place / "one.csv")]
    assert losses[-1] < losses[0] - 0.2
    assert wanted != weights(run(place, "plain", steps=12))
    cut_off(place, "two", monkeypatch, adapter=QLORA, steps=12)
    assert weights(run(place, "two", adapter=QLORA, steps=12)) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_is_merged_into_the_base_in_full_precision(place, dtype):
    adapter = run(place, "tuned", adapter=QLORA, dtype=dtype, gradient_checkpointing=True)
    assert "quantization_config" not in json.loads((adapter / "config.json").read_text())
    assert merge(place / "base", adapter, out=place / "merged").folded < 1e-5
    merged, base = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("merged", "base"))
    assert not hasattr(AutoConfig.from_pretrained(place / "merged"), "quantization_config")
    frozen = (
        "model.layers.0.mlp.up_proj.weight"  # no target: exactly the base's, without the rounding it was trained under
    )
    assert torch.equal(merged.state_dict()[frozen], base.state_dict()[frozen])


def test_what_can_not_be_is_said_in_one_line(place, monkeypatch):
    full = {"adapter": ADAPTER.model_dump() | {"method": "full", "quantized": "nf4"}}
    with pytest.raises(
        ValueError, match=r"^params: adapter\.quantized = 'nf4': only frozen weights are quantised.*method lora$"
    ):
        section_of(Adapter, full, "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(module, "zero_from_environment", lambda: Zero(3, offload=False))
        with pytest.raises(ValueError, match=r"^adapter\.quantized: ZeRO-3 .*LONGLORA_ZERO = 2$"):
            run(place, "never", adapter=QLORA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^adapter\.quantized = nf4 needs bitsandbytes: pip install .*\[qlora\]', or set null$"
    ):
        nf4(torch.float32)


def test_the_own_gpu_is_the_only_one_that_a_scheduler_shows(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, own in ((4, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device_map() == {"": own}
