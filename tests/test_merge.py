"""The merged model is the adapter model, opens with plain transformers, and says its own context."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from specimens import ADAPTER, POSITION, folder, llama, older_names
from test_adapter import logits, nudged
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from longlora.model.adapter import attach, save
from longlora.model.merge import PROBE_TOKENS, merge
from longlora.model.merge import logits as probed
from longlora.model.position import extend


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def trained(request, tmp_path):
    """A base folder and a trained adapter of it, under YaRN."""
    base = folder(tmp_path / "base", tied=request.param)
    config = extend(AutoConfig.from_pretrained(base), method=POSITION.method, context=POSITION.context)
    model = nudged(attach(AutoModelForCausalLM.from_pretrained(base, config=config), ADAPTER))
    save(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model


def test_merged_logits_are_the_adapters_in_plain_transformers(trained, tmp_path):
    base, adapter, model = trained
    assert merge(base, adapter, out=tmp_path / "merged").folded < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_context_and_rope_are_in_the_merged_config_and_its_tokenizer(trained, tmp_path):
    base, adapter, _ = trained
    merge(base, adapter, out=tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.max_position_embeddings == 128
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 2.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.model_max_length == 128
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_a_tokenizer_that_cuts_texts_for_other_clients_cuts_no_more(trained, tmp_path):
    base, adapter, _ = trained
    rules = Tokenizer.from_file(str(base / "tokenizer.json"))
    rules.enable_truncation(64)
    rules.save(str(base / "tokenizer.json"))
    merge(base, adapter, out=tmp_path / "merged")
    merged = Tokenizer.from_file(str(tmp_path / "merged/tokenizer.json"))
    assert (len(rules.encode("naïve " * 99).ids), len(merged.encode("naïve " * 99).ids) > 64) == (64, True)


def test_text_and_answer_together_may_be_as_long_as_the_new_context(trained, tmp_path):
    """Llama 2's generation_config.json says max_length: 4096."""
    base, adapter, _ = trained
    file = base / "generation_config.json"
    own = json.loads(file.read_text()) | {"do_sample": True, "temperature": 0.6}
    file.write_text(json.dumps(own | {"max_length": 32}))
    merge(base, adapter, out=tmp_path / "bounded")
    said = GenerationConfig.from_pretrained(tmp_path / "bounded")
    assert (said.max_length, said.temperature) == (128, 0.6)
    file.write_text(json.dumps(own))
    merge(base, adapter, out=tmp_path / "open")
    assert GenerationConfig.from_pretrained(tmp_path / "open").max_length is None


def test_answers_end_at_the_mark_of_the_chat_template_too(trained, tmp_path):
    """A base whose generation_config.json names the end of a text alone, as Qwen3's does, learns <eos> as the end of an answer."""
    base, adapter, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"
    tokenizer.save_pretrained(base)
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    merge(base, adapter, out=tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [tokenizer.eos_token_id, 7]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(base)
    merge(base, adapter, out=tmp_path / "as-before")
    assert GenerationConfig.from_pretrained(tmp_path / "as-before").eos_token_id == 7


def test_a_base_without_a_tokenizer_is_merged_too(trained, tmp_path):
    base, adapter, _ = trained
    for file in base.glob("token*"):
        file.unlink()
    merge(base, adapter, out=tmp_path / "merged")
    assert not [*tmp_path.glob("merged*/token*"), *tmp_path.glob("*.partial")]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.max_position_embeddings == 128


def test_a_tokenizer_in_files_of_older_names_is_merged_whole(trained, tmp_path):
    base, adapter, _ = trained
    older_names(base)
    merge(base, adapter, out=tmp_path / "merged")
    own, merged = (AutoTokenizer.from_pretrained(place) for place in (base, tmp_path / "merged"))
    assert merged("The committee met").input_ids == own("The committee met").input_ids != []
    assert merged.model_max_length == 128


def test_an_adapter_that_peft_has_saved_without_the_longer_config_is_refused(trained, tmp_path):
    base, _, model = trained
    model.save_pretrained(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-4 has no config.json, .* peft does not"):
        merge(base, tmp_path / "checkpoint-4", out=tmp_path / "merged")


def test_what_is_there_already_is_not_merged_over(trained, tmp_path):
    base, adapter, _ = trained
    merge(str(base), str(adapter), out=str(tmp_path / "merged"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="merged is there already: the merged model goes into a new folder"):
        merge(base, adapter, out=tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_a_merge_that_changes_the_logits_writes_nothing(trained, tmp_path, monkeypatch):
    base, adapter, _ = trained
    honest = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
    assert honest is None  # it is found through the tuner, so the tuner's is replaced

    from peft.tuners.lora import LoraModel

    def forgetful(self, *args, **kwargs):
        merged = merge_and_unload(self, *args, **kwargs)
        merged.model.norm.weight.data *= 1.01
        return merged

    merge_and_unload = LoraModel.merge_and_unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", forgetful)
    with pytest.raises(ValueError, match="merged logits differ by 0.01 of the largest"):
        merge(base, adapter, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_nan_is_not_merged(trained, tmp_path):
    base, adapter, _ = trained
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[next(iter(weights))][0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="merged weights hold NaN or infinity"):
        merge(base, adapter, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_dtype_of_the_base_is_kept_and_what_its_rounding_costs_is_told(tmp_path):
    """Of heads of 64 numbers: the frequencies of narrow ones are powers that 16 bits hold."""
    base, config = folder(tmp_path / "base"), llama().config
    config.head_dim = 64
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    adapted = nudged(attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ADAPTER))
    save(adapted, tmp_path / "adapter")
    folded, written = merge(base, tmp_path / "adapter", out=tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    wanted = probed(adapted.eval(), PROBE_TOKENS)
    found = (probed(plain, PROBE_TOKENS) - wanted).abs().max() / wanted.abs().max()
    assert folded < 1e-5 < 1e-4 < written == pytest.approx(found.item(), rel=1e-3)
