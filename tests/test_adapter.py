"""What is trained, what is saved, and that stock peft gets the same model back."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from specimens import ADAPTER, llama
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    NemotronConfig,
    Qwen3NextConfig,
    StableLmConfig,
    StableLmForCausalLM,
)

from longlora.model.adapter import Adapter, attach, save, trained_parameters


def nudged(model):
    """`model` after one step in a random direction, so that nothing trained is at its start."""
    generator = torch.Generator().manual_seed(1)
    for p in trained_parameters(model).values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_low_rank_matrices_embeddings_and_norms_are_trained_and_nothing_else(tied):
    trained = trained_parameters(attach(llama(tied=tied), ADAPTER))
    kinds = {"lora": 0, "embed_tokens": 0, "norm": 0}
    for name in trained:
        kinds[next(kind for kind in kinds if kind in name)] += 1
    assert kinds == {"lora": 2 * 2 * 2, "embed_tokens": 1, "norm": 2 * 2 + 1}


def test_trained_weights_are_float32_and_frozen_ones_stay_as_they_are():
    model = attach(llama().bfloat16(), ADAPTER)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_stock_peft_loads_the_adapter_and_gives_the_same_logits(tied, tmp_path):
    model = nudged(attach(llama(tied=tied), ADAPTER))
    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(tied=tied), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), logits(llama(tied=tied)), atol=1e-2)


def test_tied_embeddings_stay_tied():
    model = nudged(attach(llama(tied=True), ADAPTER)).merge_and_unload()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_matrices_that_the_config_ties_are_refused_until_it_says_that_they_are_two(tmp_path):
    llama(tied=False).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"config ties lm_head\.weight .*: open it with tie_word_embeddings=False$"):
        attach(AutoModelForCausalLM.from_pretrained(tmp_path), ADAPTER)
    model = attach(AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False), ADAPTER)
    torch.testing.assert_close(logits(model.eval()), logits(llama(tied=False)))


def test_the_adapter_names_no_place(tmp_path):
    save(attach(llama(), ADAPTER), str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    }


def test_saving_twice_gives_the_same_bytes_in_any_process_which_says_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from specimens import ADAPTER, llama;"
        "from longlora.model.adapter import attach, save;"
        "save(attach(llama(), ADAPTER), Path(sys.argv[1]))"
    )
    for seed in ("1", "2", "3"):  # of the order in which a set gives its members
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")
    for file in (tmp_path / "1").iterdir():
        assert {(tmp_path / seed / file.name).read_bytes() for seed in "123"} == {file.read_bytes()}, file.name


def test_a_model_with_other_names_is_served_too(tmp_path):
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False))
    adapted = attach(model, ADAPTER.model_copy(update={"target_modules": ["query_key_value", "dense"]}))
    names = " ".join(trained_parameters(adapted))
    assert all(
        part in names for part in ("embed_in", "input_layernorm", "post_attention_layernorm", "final_layer_norm")
    )
    save(adapted, tmp_path / "adapter")
    assert "base_model.model.gpt_neox.embed_in.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")


def test_a_norm_that_is_called_as_a_layer_is_trained_and_the_layer_is_not(tmp_path):
    """StableLM 2 has a norm for each head, in a list."""
    torch.manual_seed(0)
    base = StableLmForCausalLM(
        StableLmConfig(vocab_size=90, hidden_size=32, intermediate_size=40, num_hidden_layers=2, qk_layernorm=True)
    )
    before = copy.deepcopy(base)
    model = nudged(attach(base, ADAPTER))
    kinds = {
        name.split(".modules_to_save")[0].split(".")[-1] for name in trained_parameters(model) if "lora" not in name
    }
    assert kinds == {*map(str, range(32)), "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}
    assert not any(".mlp." in name or "q_proj.weight" in name for name in trained_parameters(model))
    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}
GATED = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
GATED |= {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
NAMED_OTHERWISE = {
    "LayerNorm1P": NemotronConfig(**SIZES),
    "RMSNormGated": Qwen3NextConfig(**SIZES, **GATED, layer_types=["linear_attention", "full_attention"]),
}


@pytest.mark.parametrize("kind", NAMED_OTHERWISE)
def test_a_norm_whose_kind_is_named_otherwise_is_trained_too(kind, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(NAMED_OTHERWISE[kind])
    before = copy.deepcopy(base)
    norms = {name for name, _ in base.named_parameters() if "norm" in name}
    model = nudged(attach(base, ADAPTER))
    trained = {name.replace("modules_to_save.default.", "") for name in trained_parameters(model)}
    assert norms and norms == {name.removeprefix("base_model.model.") for name in trained if "norm" in name}
    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_target_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer 'q_porj'; did you mean 'q_proj'"):
        attach(llama(), ADAPTER.model_copy(update={"target_modules": ["q_porj"]}))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_has_an_adapter_already_is_refused(method):
    base = llama()
    adapted = attach(base, ADAPTER)
    for model in (adapted, base):  # peft puts its layers into the base
        with pytest.raises(ValueError, match=r"^the model has an adapter already: "):
            attach(model, ADAPTER.model_copy(update={"method": method}))
    assert attach(adapted.merge_and_unload(), ADAPTER)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = attach(llama(), ADAPTER)
    next(iter(trained_parameters(model).values())).data[0] = torch.nan
    with pytest.raises(ValueError, match="1 trained tensors hold NaN"):
        save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def own_recipe(**settings):
    return LoraConfig(task_type="CAUSAL_LM", r=3, **{"target_modules": r".*\.(q|v)_proj", **settings})


def test_targets_by_a_pattern_are_saved_as_they_are(tmp_path):
    """As docs/library.md allows."""
    model = nudged(get_peft_model(llama(), own_recipe()))
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_an_adapter_that_a_merge_would_not_find_is_not_saved(tmp_path):
    named = get_peft_model(llama(), own_recipe(), adapter_name="long")
    two = get_peft_model(llama(), own_recipe())
    two.add_adapter("second", own_recipe(target_modules=["k_proj"]))
    for model, names in ((named, "long"), (two, "default, second")):
        with pytest.raises(
            ValueError, match=rf"the one called default, and the model has {names}: give get_peft_model no"
        ):
            save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_full_trains_everything():
    model = attach(llama(), Adapter(**{**ADAPTER.model_dump(), "method": "full"}))
    assert all(p.requires_grad for p in model.parameters())
