"""What can not be opened or read is said in one line, by the folder's name; what can be read is read beyond the config's number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from specimens import folder
from test_passkey import byte_level, settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from longlora.plain import must_reach, open_model, open_tokenizer
from longlora.stages import passkey as stages_passkey

torch.set_num_threads(1)  # matrices this small are slower on two


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("plain") / "whole")


def cut(place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def strange(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "incomplete metadata"),
        (strange, "has model type `strange`"),
        (lambda place: (place / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda place: (place / "model.safetensors").unlink(), "no file named model.safetensors"),
    ],
)
def test_a_model_that_does_not_open_is_named_with_the_reason_in_one_line(whole, tmp_path, harm, said):
    shutil.copytree(whole, tmp_path / "odd")
    harm(tmp_path / "odd")
    with pytest.raises(ValueError, match=f"the model at .*odd does not open: .*{said}") as error:
        open_model(tmp_path / "odd")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_open_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "odd")
    (tmp_path / "odd/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer at .*odd does not open: "):
        open_tokenizer(tmp_path / "odd")


SIZES = {"vocab_size": 340, "num_hidden_layers": 1, "num_attention_heads": 3}


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=340, n_positions=64, n_embd=24, n_layer=1, n_head=3)),
        OPTForCausalLM(
            OPTConfig(**SIZES, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, max_position_embeddings=64)
        ),
    ],
    ids=["GPT-2", "OPT"],
)
def test_learned_positions_end_and_what_reads_to_their_end_is_let_through(model: PreTrainedModel, tmp_path):
    must_reach(model, 64)
    model(input_ids=torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="65 tokens are asked for, and this model has 64 positions"):
        must_reach(model, 65)
    model.save_pretrained(tmp_path / "odd")
    byte_level().save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"309 tokens are asked for, .* lower the lengths to 64"):
        stages_passkey.stage(tmp_path / "odd", tmp_path / "odd.json", settings(lengths=[310]))


def test_rotary_positions_do_not_end(whole):
    model = open_model(whole)
    assert isinstance(model, LlamaForCausalLM) and model.config.max_position_embeddings == 64
    must_reach(model, 5000)
