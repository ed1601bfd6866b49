"""The kernels and the training that need a CUDA GPU, for real; the other tests put a reference in their place."""

import importlib.util
import json

import pytest
import torch
from dense import dense_attention, visible
from specimens import ADAPTER, ATTENTION, POSITION, tokenizer
from training import cut_off, history, run, weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longlora.attention.kernels import flash_version
from longlora.attention.shifted import shifted_sparse_attention
from longlora.model.load import open_model
from longlora.model.merge import merge
from longlora.training import fit as module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
LENGTH, GROUP, DIM = 300, 96, 64
DOCUMENTS = {
    "plain": None,
    "packed": torch.tensor([[0] * 120 + [1] * 180, [3] * 2 + [1] * 290 + [2] * 8]),
    "padded": torch.tensor([[-1] * 40 + [0] * 260, [0] * 110 + [1] * 50 + [-1] * 140]),
    "one row all padding": torch.tensor([[-1] * LENGTH, [0] * LENGTH]),
}


def away(ours: torch.Tensor, true: torch.Tensor) -> float:
    """Relative to the size of the truth; NaN and infinity are far away."""
    distance = (ours.double().cpu() - true).norm() / true.norm().clamp(min=1e-9)
    return distance.item() if torch.isfinite(distance) else float("inf")


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3)])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash", "flex"])
def test_a_kernel_gives_what_the_mask_does_and_its_gradients(backend, heads, kv_heads, documents):
    if backend == "flex" and (heads, documents) not in ((6, "plain"), (9, "packed")):
        pytest.skip("compiles for minutes: two shapes of it are enough")
    if backend == "flash" and flash_version() is None:
        pytest.skip("flash-attn is not installed")
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, LENGTH, h, DIM, generator=generator).bfloat16() for h in (heads, kv_heads, kv_heads)]
    ours, true = (
        [x.to(**how).transpose(1, 2).requires_grad_() for x in drawn]
        for how in ({"device": "cuda"}, {"dtype": torch.float64})
    )
    ids = DOCUMENTS[documents]
    out = shifted_sparse_attention(
        *ours, group_size=GROUP, document_ids_BL=None if ids is None else ids.cuda(), backend=backend, scaling=0.2
    )
    dense = dense_attention(*true, mask_BHLL=visible(heads=heads, length=LENGTH, group=GROUP, ids_BL=ids), scaling=0.2)
    grad = torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    assert away(out, dense) < 0.01
    found = torch.autograd.grad(out, ours, grad.to(out))
    for one, two in zip(found, torch.autograd.grad(dense, true, grad), strict=True):
        assert away(one, two) < 0.015


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_memory_is_linear_in_the_length(backend):
    def rise(length: int) -> float:
        q, k, v = (
            torch.randn(1, length, h, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for h in (8, 2, 2)
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = shifted_sparse_attention(q, k, v, group_size=length // 4, backend=backend)
        torch.autograd.grad(out.sum(), (q, k, v))
        return torch.cuda.max_memory_allocated() - before

    rise(1024)
    assert rise(65536) < 4.5 * rise(16384)


@pytest.fixture
def gpu_place(place, monkeypatch):
    """A base whose heads are wide enough for the kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    monkeypatch.setitem(run.__globals__, "ATTENTION", ATTENTION.model_copy(update={"backend": "auto"}))
    return place


def near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], *, atol: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=atol)


def tensors(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_learns_and_its_merged_model_says_the_same(gpu_place, dtype):
    adapter = run(gpu_place, "tuned", dtype=dtype, steps=20, save_steps=100)
    rows = history(gpu_place / "tuned.csv")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    cost = json.loads((gpu_place / "tuned.json").read_text())["tuned"]
    assert 0 < cost["peak_memory_gb"] < 2
    merge(gpu_place / "base", adapter, out=gpu_place / "merged")
    model = open_model(gpu_place / "merged")
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    tokens_BL = torch.arange(100, device="cuda")[None] % 31
    on_cpu = AutoModelForCausalLM.from_pretrained(gpu_place / "merged", dtype=torch.float32)
    wanted = on_cpu(tokens_BL.cpu(), labels=tokens_BL.cpu()).loss.item()
    assert model(tokens_BL, labels=tokens_BL).loss.item() == pytest.approx(wanted, rel=0.02)


def test_the_backend_does_not_change_what_is_learnt(gpu_place):
    losses = {}
    for backend in ("varlen", "sdpa"):
        attention = ATTENTION.model_copy(update={"backend": backend})
        run(gpu_place, backend, dtype="bfloat16", attention=attention)
        losses[backend] = [row["loss"] for row in history(gpu_place / f"{backend}.csv")]
    assert losses["varlen"] == pytest.approx(losses["sdpa"], rel=5e-3)


def test_a_run_that_was_cut_off_goes_on_with_the_same_noise(gpu_place, monkeypatch):
    """NEFTune draws on the GPU, whose generator is seeded for each micro-batch."""
    changes = {"neftune_noise_alpha": 5.0, "steps": 8}
    whole = tensors(run(gpu_place, "whole", **changes))
    cut_off(gpu_place, "resumed", monkeypatch, **changes)
    torch.cuda.manual_seed(99)
    near(tensors(run(gpu_place, "resumed", **changes)), whole, atol=1e-4)


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"mlp_tile": 40}, {"loss_chunk": 7}])
def test_what_saves_memory_changes_nothing_that_is_learnt(gpu_place, change):
    wanted = tensors(run(gpu_place, "plain"))
    near(tensors(run(gpu_place, "saving", **change)), wanted, atol=2e-4)


def test_checkpoints_in_the_hosts_memory_are_the_same_training_with_less_on_the_gpu(gpu_place):
    place = gpu_place
    kept = run(place, "kept", gradient_checkpointing=True)
    away_ = run(place, "away", gradient_checkpointing=True, activation_offloading=True)
    near(tensors(away_), tensors(kept), atol=2e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_learns_on_four_bits_and_merges_into_the_whole_base(gpu_place):
    adapter = ADAPTER.model_copy(update={"quantized": "nf4"})
    folder = run(gpu_place, "four", dtype="bfloat16", adapter=adapter, steps=20, save_steps=100)
    rows = history(gpu_place / "four.csv")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    model = module.build(gpu_place / "base", position=POSITION, adapter=adapter, dtype="bfloat16")
    kinds = {type(m).__name__ for m in model.modules()}
    assert any(kind.endswith("Linear4bit") for kind in kinds)
    merge(gpu_place / "base", folder, out=gpu_place / "merged")


def test_the_energy_of_a_training_is_counted(gpu_place):
    pytest.importorskip("pynvml")
    run(gpu_place, "tuned", steps=4)
    cost = json.loads((gpu_place / "tuned.json").read_text())["tuned"]
    assert cost["gpu_energy_wh"] > 0
    assert weights(gpu_place / "tuned")
