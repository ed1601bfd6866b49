"""A base model by source, as one plain folder."""

import json
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from specimens import folder, older_names
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    MambaConfig,
    MllamaConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from longlora.model import integrity
from longlora.model.backbone import Backbone, fetch, find_gguf, sha256
from longlora.model.merge import write
from longlora.section import raised_here


def source(name: object, **changes: object) -> Backbone:
    return Backbone(**{"source": "folder", "name": str(name), "revision": None, "license": "MIT", **changes})


def test_a_folder_comes_over_as_it_is_with_its_provenance(tmp_path):
    place = folder(tmp_path / "mine")
    (place / "notes.md").write_text("not part of the model")
    fetch(source(place), out=tmp_path / "base")
    mine, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("mine", "base"))
    assert all(torch.equal(mine[name], base[name]) for name in mine)
    assert AutoTokenizer.from_pretrained(tmp_path / "base").model_max_length == 64
    assert not (tmp_path / "base/notes.md").exists()
    provenance = json.loads((tmp_path / "base/provenance.json").read_text())
    assert provenance["license"] == "MIT"
    assert provenance["sha256"] == {"model.safetensors": sha256(place / "model.safetensors")}


def test_a_pinned_digest_is_checked(tmp_path):
    place = folder(tmp_path / "mine")
    fetch(source(place, revision=sha256(place / "model.safetensors")), out=tmp_path / "base")
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, backbone.revision pins 00"):
        fetch(source(place, revision="00"), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_pin_of_one_file_is_not_taken_for_several(tmp_path):
    place = folder(tmp_path / "mine")
    first = (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    (place / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"backbone\.revision is the sha256 of one file, and .* holds 2 of weights"):
        fetch(source(place, revision=sha256(first)), out=tmp_path / "base")


def test_a_missing_folder_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        fetch(source(tmp_path / "nowhere"), out=tmp_path / "base")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors; weights in other formats .* are pickles"):
        fetch(source(tmp_path / "pickled"), out=tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_folder_without_a_tokenizer_is_said_so(tmp_path):
    place = folder(tmp_path / "mine")
    for file in place.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"mine holds no tokenizer \(tokenizer\.json, .*\): save the model's own beside it"
    ):
        fetch(source(place), out=tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_folder_without_a_config_is_said_so(tmp_path):
    place = folder(tmp_path / "mine")
    (place / "config.json").unlink()
    with pytest.raises(ValueError, match=r"mine holds no config\.json, which says what model the weights are of$"):
        fetch(source(place), out=tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", '{"model_type": "strange"}', "config.json does not open: .*has model type `strange`"),
        ("config.json", "[1]", "config.json does not open: "),
        ("tokenizer.json", '{"model": {}}', "tokenizer does not open: KeyError: "),
        ("model.safetensors", "", "model does not open: "),
        ("generation_config.json", "{", "generation_config.json does not open: .* not a valid JSON file"),
    ],
)
def test_what_does_not_open_is_said_in_one_line(tmp_path, file, text, said):
    place = folder(tmp_path / "mine")
    (place / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^backbone\.name: its {said}.*$") as told:
        fetch(source(place), out=tmp_path / "base")
    assert raised_here(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("eos_token_id", "</s>", [1, 2]),
        ("eos_token_id", [1, "</s>"], 1),
        ("eos_token_id", True, None),
        ("max_length", "4096", 4096),
        ("max_length", 40.5, None),
    ],
)
def test_a_base_whose_generation_config_says_what_the_merge_could_not_read_is_refused(tmp_path, key, value, right):
    place = folder(tmp_path / "mine")
    file = place / "generation_config.json"
    file.write_text(json.dumps({key: value}))
    said = re.escape(f"backbone.name: its generation_config.json says {key} = {value!r}: must be ")
    with pytest.raises(ValueError, match=f"^{said}.* null$"):
        fetch(source(place), out=tmp_path / "base")
    file.write_text(json.dumps({key: right}))
    fetch(source(place), out=tmp_path / "right")


@pytest.mark.parametrize(
    ("tied", "name", "lacking"),
    [(False, "lm_head.weight", True), (True, "model.norm.weight", True), (True, "lm_head.weight", False)],
)
def test_a_base_that_lacks_a_weight_is_refused_where_it_is_not_the_embeddings(tmp_path, tied, name, lacking):
    """transformers puts one by chance in its place. A tied head is in no file."""
    place = folder(tmp_path / "mine", tied=tied)
    weights = load_file(place / "model.safetensors")
    assert (weights.pop(name, None) is not None) == lacking
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    if not lacking:
        fetch(source(place), out=tmp_path / "base")
        return
    with pytest.raises(ValueError, match=rf"it lacks weights .* or has them in other sizes: 1, {name} first"):
        fetch(source(place), out=tmp_path / "base")


@pytest.mark.parametrize("same", [True, False])
def test_a_base_whose_config_ties_two_different_matrices_is_refused(tmp_path, same):
    """transformers leaves them apart, and peft would save the embeddings as the head. Some files hold the one matrix twice."""
    place = folder(tmp_path / "mine", tied=True)
    weights = load_file(place / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embeddings.clone() if same else embeddings.flip(0)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    if same:
        fetch(source(place), out=tmp_path / "base")
        return
    said = r'its config\.json ties lm_head\.weight to model\.embed_tokens\.weight, .*: say "tie_word_embeddings": false there '
    with pytest.raises(ValueError, match=said):
        fetch(source(place), out=tmp_path / "base")


def test_weights_with_an_adapter_beside_them_are_refused(tmp_path):
    place = folder(tmp_path / "mine")
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter .* merge the two, or take it away"):
        fetch(source(place), out=tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_tokenizer_in_python_alone_is_refused(tmp_path):
    place = folder(tmp_path / "mine")
    (place / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(place)
    with pytest.raises(
        ValueError, match="its tokenizer, a ByT5Tokenizer, has no form that the tokenizers library runs"
    ):
        fetch(source(place), out=tmp_path / "base")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    place = folder(tmp_path / "mine")
    tokenizer = AutoTokenizer.from_pretrained(place)
    known = AutoModelForCausalLM.from_pretrained(place).config.vocab_size
    tokenizer.add_tokens([f"word{n}" for n in range(known - len(tokenizer))])
    tokenizer.save_pretrained(place)
    fetch(source(place), out=tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(place)
    said = rf"its tokenizer has a token {known} \('<pad>'\), and the model knows {known} tokens, 0 to {known - 1}"
    with pytest.raises(ValueError, match=said):
        fetch(source(place), out=tmp_path / "other")


def test_a_tokenizer_in_files_of_older_names_reaches_the_merged_model(tmp_path):
    place = folder(tmp_path / "mine")
    older_names(place)
    fetch(source(place), out=tmp_path / "base")
    write(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), base=tmp_path / "base", out=tmp_path / "merged")
    assert integrity.tokenizer(tmp_path / "base", extended=tmp_path / "merged").value


def test_the_one_gguf_file_of_an_installed_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / "weights/model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_gguf("some-model==1.2", scratch=tmp_path) == package / "weights/model.gguf"
    (package / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="must hold one GGUF file, it holds 2"):
        find_gguf("some-model==1.2", scratch=tmp_path)


@pytest.mark.parametrize("error", [RepositoryNotFoundError("401: gated.\nLog in.", response=Mock()), None])
def test_a_model_that_is_not_on_the_hub_is_named(tmp_path, monkeypatch, error):
    if error:
        monkeypatch.setattr("longlora.model.backbone.snapshot_download", Mock(side_effect=error))
    asked = Backbone(source="hub", name="me/ty/po", revision=None, license="MIT")
    with pytest.raises(ValueError, match=r"^backbone.name: 'me/ty/po' on the hub: .*$") as told:
        fetch(asked, out=tmp_path / "out")
    assert raised_here(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(("why", "status"), [({"HF_HUB_OFFLINE": "1"}, 2), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 1)])
def test_a_hub_that_is_not_reached_is_said_in_one_line_by_the_stage(tmp_path, why, status):
    """Status 2 is not tried again; a hub that is away may come back."""
    asked = source("some/model", source="hub").model_dump()
    (tmp_path / "params.yaml").write_text(json.dumps({"backbone": asked}))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        **why,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "longlora.stages.backbone", "base"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert re.fullmatch(r"error: backbone\.name: 'some/model' on the hub: .+\n", done.stderr)
    assert not (tmp_path / "base").exists()


def test_a_model_that_is_no_decoder_of_text_is_refused_in_one_line(tmp_path):
    base = folder(tmp_path / "base")
    Qwen2VLConfig().save_pretrained(base)
    with pytest.raises(
        ValueError, match="a qwen2_vl model is none that .*AutoModelForCausalLM.*: take its text model alone$"
    ):
        fetch(source(base), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MllamaConfig(),
            "the text model of a mllama model, .* is none that AutoModelForCausalLM opens again: take another base$",
        ),
        (MambaConfig(), "a mamba model's config has no max_position_embeddings, the context that is extended$"),
    ],
)
def test_a_model_that_could_not_be_opened_after_its_training_or_has_no_context_is_refused(config, words, tmp_path):
    base = folder(tmp_path / "base")
    config.save_pretrained(base)
    with pytest.raises(ValueError, match=words):
        fetch(source(base), out=tmp_path / "out")


def test_a_text_model_that_is_saved_alone_reads_as_its_base(tmp_path):
    """For qwen3_5_text transformers takes the class that a file names, for qwen3_5 it knows better."""
    torch.manual_seed(0)
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    text = sizes | heads | linear | {"layer_types": ["linear_attention", "full_attention"]}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    mine = folder(tmp_path / "mine")
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=sight)).save_pretrained(mine)
    file = mine / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    fetch(source(mine), out=tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    write(model, base=tmp_path / "base", out=tmp_path / "merged")
    assert (model.config.model_type, type(AutoTokenizer.from_pretrained(mine)).__name__) == (
        "qwen3_5_text",
        "Qwen3_5Tokenizer",
    )
    fact = integrity.tokenizer(tmp_path / "base", extended=tmp_path / "merged")
    assert fact.value, fact.reason
