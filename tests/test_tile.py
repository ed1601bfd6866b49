"""A feed-forward in tiles is the feed-forward: values and gradients, with adapters in it and checkpointing around it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from specimens import ADAPTER, FIT, llama
from training import run, weights
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longlora.model.adapter import attach
from longlora.training.fit import arguments
from longlora.training.tile import tile_mlp, tiled

SIZES = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EVERY = [*ADAPTER.target_modules, "gate_proj", "up_proj", "down_proj"]


def gradients(model, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Loss and the gradients of one training step, in float64."""
    model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens_BL = torch.randint(3, 300, (2, 37), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def adapted(*, every: bool):
    model = llama()
    torch.manual_seed(1)
    wrapped = attach(model, ADAPTER.model_copy(update={"target_modules": EVERY} if every else {}))
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    return wrapped


def seeded(model):
    torch.manual_seed(0)
    return model()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: adapted(every=False),
        lambda: adapted(every=True),
        llama,
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    ],
    ids=["adapters", "adapters in the feed-forward", "in full", "qwen3", "phi3"],
)
@pytest.mark.parametrize("tile", [1, 8])
def test_loss_and_every_gradient_are_those_of_one_piece(build, checkpointing, tile):
    whole = gradients(seeded(build), checkpointing=checkpointing)
    model = seeded(build)
    tile_mlp(model, tile=tile)
    in_tiles = gradients(model, checkpointing=checkpointing)
    assert in_tiles.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            in_tiles[name], value, rtol=1e-10, atol=1e-12, msg=lambda said, n=name: f"{n}: {said}"
        )


def test_no_more_tokens_are_taken_at_once_than_a_tile_and_none_twice():
    seen = []
    model = llama()
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[1]))
    tile_mlp(model, tile=8)
    with torch.no_grad():
        model(torch.ones(1, 37, dtype=torch.long))
    assert seen == [8, 8, 8, 8, 5]


def test_no_activation_of_the_full_width_is_saved():
    wide = torch.nn.Sequential(torch.nn.Linear(4, 4096), torch.nn.SiLU(), torch.nn.Linear(4096, 4))
    shapes = []
    x = torch.randn(1, 64, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        tiled(wide.forward, tile=16)(x)
        assert not [shape for shape in shapes if shape[-1] == 4096]
        wide(x)
    assert [shape for shape in shapes if shape[-1] == 4096]


def test_a_model_without_a_gated_feed_forward_is_refused():
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has no gated feed-forward"):
        tile_mlp(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), tile=8)
    wrapped = attach(
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), ADAPTER.model_copy(update={"target_modules": ["query_key_value"]})
    )
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has no gated feed-forward"):  # as a training has it
        tile_mlp(wrapped, tile=8)
    with pytest.raises(ValueError, match=r"fit.mlp_tile = 0: at least 1"):
        tile_mlp(llama(), tile=0)


def test_a_tile_as_long_as_the_sequence_trains_to_the_same_bytes_and_a_shorter_one_to_nearly_the_same(place):
    whole = run(place, "whole")
    assert weights(run(place, "long", mlp_tile=128)) == weights(whole)
    short, long = (
        load_file(run(place, n, mlp_tile=t) / "adapter_model.safetensors") for n, t in (("a", 48), ("b", None))
    )
    for name, value in long.items():
        torch.testing.assert_close(short[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoints_on_the_host_change_no_gradient(monkeypatch):
    here = gradients(seeded(llama), checkpointing=True)
    moved = []

    def without_a_gpu(*, pin_memory, device_type):
        assert pin_memory  # which a machine without a GPU cannot do
        moved.append(device_type)
        return torch.autograd.graph.save_on_cpu()

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", without_a_gpu)
    model = seeded(llama)
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
    there = gradients(model, checkpointing=False)
    # a layer each; PyTorch built for GPUs names one, though there is none
    assert moved == [getattr(torch.accelerator.current_accelerator(), "type", "cpu")] * 2
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def test_the_host_is_asked_for_only_where_there_is_a_gpu(place, monkeypatch):
    asked = FIT.model_copy(update={"gradient_checkpointing": True, "activation_offloading": True})
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(
            "longlora.training.fit.TrainingArguments", lambda **said: SimpleNamespace(said=said, n_gpu=1)
        )
        said = arguments(asked, checkpoints=place, accumulation=1, zero=None).said
        assert said["activation_checkpointing_kwargs"] == {"use_reentrant": False, "offload": gpu}
