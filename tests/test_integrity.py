"""Facts about real broken model folders, and the gate's refusal of each by the rule that is meant for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from longlora.model.integrity import logits, measure, trained
from longlora.model.position import Position, extend
from longlora.model.seal import seal
from longlora.report.gate import Gate, judge
from longlora.report.scores import read
from longlora.section import read_params, section_of
from longlora.stages.integrity import stage

torch.set_num_threads(1)  # matrices this small are slower on two

POSITION = Position(method="yarn", context=320)
RULES = section_of(Gate, read_params(Path(__file__).parent.parent / "params.yaml"), "gate").rules
FACTS = {r.metric.removeprefix("integrity/"): r.name for r in RULES if r.metric.startswith("integrity/")}


def bytes_tokenizer(*, reverse: bool = False) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {s: i for i, s in enumerate(["<s>", "</s>", *symbols])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=80,
    )
    folder = tmp_path_factory.mktemp("models") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def extended(base, tmp_path) -> Path:
    """A good one: the base's weights moved a little, under the new positions."""
    config = extend(AutoConfig.from_pretrained(base), method="yarn", context=320)
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 0.01
    model.save_pretrained(tmp_path / "extended")
    bytes_tokenizer().save_pretrained(tmp_path / "extended")
    seal(tmp_path / "extended")
    return tmp_path / "extended"


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put_nan(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan


def put_infinity(tensors):
    tensors["model.norm.weight"][2] = torch.inf


def drop_one(tensors):
    del tensors["model.layers.1.self_attn.v_proj.weight"]


def add_one(tensors):
    tensors["model.layers.9.self_attn.v_proj.weight"] = torch.ones(3)


def reshape_one(tensors):
    tensors["model.norm.weight"] = torch.ones(25)


def truncate(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def edit_normalizer(folder: Path, base: Path) -> None:
    """The vocabulary, the special tokens and the ids of the probe stay."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Replace", "pattern": {"String": "market"}, "content": "fair"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def swallow_spaces(folder: Path, base: Path) -> None:
    """A token of the vocabulary as an added one, which takes the space before it: the probe has no such letter."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    added = {name: False for name in ("single_word", "rstrip", "normalized", "special")}
    raw["added_tokens"].append({"id": raw["model"]["vocab"]["Q"], "content": "Q", "lstrip": True} | added)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def forget_decoding(folder: Path, base: Path) -> None:
    """Texts are read as ever; answers come as the signs that bytes have in the vocabulary."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"decoder": None}))


def overflow_in_16_bits(folder: Path, base: Path) -> None:
    """Nothing changes in float32, in which a CPU measures: what one matrix is larger, the next is smaller."""

    def swell(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] *= 2.0**21
        tensors["model.layers.0.mlp.down_proj.weight"] *= 2.0**-21

    edit_weights(folder, swell)
    edit_config(folder, dtype="float16")


def to_8_bits(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.full_like(tensors[name], torch.nan).to(torch.float8_e4m3fn)


def cut(folder: Path, file: str, **settings) -> None:
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(raw | settings))


def swap_index(folder: Path, base: Path) -> None:
    """The model in several files, sealed; then an index that sends two tensors to each other's file."""
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="8KB")
    seal(folder)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first, *_, last = raw["weight_map"]
    raw["weight_map"] |= {first: raw["weight_map"][last], last: raw["weight_map"][first]}
    index.write_text(json.dumps(raw))


def add(folder: Path, name: str, data: bytes = b"") -> None:
    (folder / name).write_bytes(data)


def copy_base_weights(folder: Path, base: Path) -> None:
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


BAD = {
    "NaN": (lambda f, b: edit_weights(f, put_nan), "finite", "layers.0.mlp.up_proj.weight first"),
    "infinity": (lambda f, b: edit_weights(f, put_infinity), "finite", "1 of 21 tensors"),
    "NaN in logits": (lambda f, b: edit_weights(f, put_nan), "logits", "positions 0 to 63 are not finite"),
    "end cut off": (lambda f, b: truncate(f, -100), "whole", "not fully covered"),
    "only a stub": (lambda f, b: truncate(f, 5), "whole", "header too small"),
    "empty file": (lambda f, b: truncate(f, 0), "whole", "header too small"),
    "no weights": (lambda f, b: (f / "model.safetensors").unlink(), "whole", "no file named model.safetensors"),
    "tensor missing": (lambda f, b: edit_weights(f, drop_one), "whole", "1 missing keys: model.layers.1.self_attn.v_proj"),
    "tensor to spare": (lambda f, b: edit_weights(f, add_one), "whole", "1 unexpected keys: model.layers.9"),
    "wrong shape": (lambda f, b: edit_weights(f, reshape_one), "whole", "does not open"),
    "config cut off": (lambda f, b: (f / "config.json").write_text('{"model_type":'), "whole", "does not open"),
    "config is missing": (lambda f, b: (f / "config.json").unlink(), "context", "does not open"),
    "untrained": (copy_base_weights, "trained", "every weight is the base's"),
    "RoPE missing": (
        lambda f, b: edit_config(f, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
        "rope",
        '"rope_type": "default"}, trained under was',
    ),
    "other factor": (
        lambda f, b: edit_config(f, rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}),
        "rope",
        '"factor": 2.0',
    ),
    "original window beside the settings, which counts": (
        lambda f, b: edit_config(f, original_max_position_embeddings=9999),
        "rope",
        '"original_max_position_embeddings": 9999',
    ),
    "finite in float32 alone": (overflow_in_16_bits, "logits", "positions 0 to 63 are not finite"),
    "NaN in 8 bits": (lambda f, b: edit_weights(f, to_8_bits), "finite", "1 of 21 tensors holds NaN"),
    "quantised by its config": (
        lambda f, b: edit_config(f, quantization_config={"quant_method": "fp8"}),
        "whole",
        'asks for quantised weights: {"quant_method": "fp8"',
    ),
    "quantised for a package that is not here": (
        lambda f, b: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "whole",
        "asks for quantised weights",
    ),
    "index swapped": (swap_index, "sealed", "model.safetensors.index.json is not the file that was written"),
    "weights of another format beside": (
        lambda f, b: add(f, "pytorch_model.bin"), "sealed", "pytorch_model.bin is not in SHA256SUMS",
    ),
    "code beside": (
        lambda f, b: [edit_config(f, auto_map={"AutoModelForCausalLM": "own.Own"}), add(f, "own.py")],
        "sealed",
        "own.py is not in SHA256SUMS; config.json is not the file that was written",
    ),
    "another tokenizer for other clients": (
        lambda f, b: add(f, "tokenizer.model"), "sealed", "tokenizer.model is not in SHA256SUMS",
    ),
    "a window that slides for other clients": (
        lambda f, b: edit_config(f, sliding_window=64, layer_types=["sliding_attention"] * 2),
        "sealed",
        "config.json is not the file",
    ),
    "words never to be said": (
        lambda f, b: cut(f, "generation_config.json", suppress_tokens=[5]), "sealed", "generation_config.json is not the file",
    ),
    "context forgotten": (lambda f, b: edit_config(f, max_position_embeddings=80), "context", "80 positions, and should say 320"),
    "other tokenizer": (
        lambda f, b: bytes_tokenizer(reverse=True).save_pretrained(f),
        "tokenizer",
        "other vocabulary, other ids of a probe text",
    ),
    "tokenizer with other rules": (edit_normalizer, "tokenizer", "not the base's tokenizer: other rules"),
    "tokenizer with another added token": (swallow_spaces, "tokenizer", "not the base's tokenizer: other rules"),
    "tokenizer that writes otherwise": (forget_decoding, "tokenizer", "not the base's tokenizer: other rules"),
    "tokenizer without rules": (
        lambda f, b: [(f / "tokenizer.json").unlink(), ByT5Tokenizer().save_pretrained(f)],
        "tokenizer",
        "not the base's tokenizer: other vocabulary, other special tokens, other ids of a probe text, other rules",
    ),
    "tokenizer with another chat template": (
        lambda f, b: (f / "chat_template.jinja").write_text("Say it twice. {{ messages[0].content }}"),
        "tokenizer",
        "another chat template",
    ),
    "tokenizer that cuts at the base's window": (
        lambda f, b: cut(f, "tokenizer_config.json", model_max_length=80), "tokenizer", "at 80 tokens, and should read 320",
    ),
    "tokenizer that cuts for other clients": (
        lambda f, b: cut(
            f, "tokenizer.json", truncation={"direction": "Right", "max_length": 80, "strategy": "LongestFirst", "stride": 0},
        ),
        "tokenizer",
        "cuts texts at 80 tokens",
    ),
    "answers that end elsewhere": (
        lambda f, b: cut(f, "generation_config.json", eos_token_id=[2, 100]),
        "tokenizer",
        "an answer ends at the tokens [2, 100], and should end at [2]",
    ),
    "answers that never end": (
        lambda f, b: cut(f, "generation_config.json", eos_token_id=None), "tokenizer", "at the tokens [], and should end at [2]",
    ),
    "text and answer bounded by the base's window": (
        lambda f, b: cut(f, "generation_config.json", max_length=80), "tokenizer", "allows 80 tokens of text and answer",
    ),
    "end marks broken": (
        lambda f, b: (f / "generation_config.json").write_text("{"), "tokenizer", "generation_config.json does not open",
    ),
    "tokenizer broken": (lambda f, b: (f / "tokenizer.json").write_text("{"), "tokenizer", "does not open"),
}  # fmt: skip


def test_a_good_model_has_every_fact_and_passes(base, extended, tmp_path):
    stage(base, extended, tmp_path / "scores/integrity.json", POSITION)
    scores = read(tmp_path / "scores")
    facts = scores.tree["integrity"]
    assert {name: facts[name]["value"] for name in FACTS} == dict.fromkeys(FACTS, 1)
    assert (facts["window"]["value"], facts["target"]["value"]) == (80, 320)
    assert facts["trained"]["reason"].startswith("1 of 21 tensors differs")


def test_logits_are_looked_at_where_the_context_begins_and_where_it_ends(base, monkeypatch):
    model, seen = AutoModelForCausalLM.from_pretrained(base), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["position_ids"].flatten().tolist()) or forward(**k))
    assert logits(model, length=320).value == 1
    assert seen == [list(range(64)), list(range(256, 320))]


def test_every_fact_is_asked_by_a_rule(base, extended):
    facts = measure(base, extended=extended, position=POSITION)["integrity"]
    assert facts.keys() - {"window", "target"} == FACTS.keys()


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_folder_is_refused_by_the_rule_that_is_meant_for_it(kind, base, extended, tmp_path):
    breaks, fact, reason = BAD[kind]
    breaks(extended, base)
    stage(base, extended, tmp_path / "scores/integrity.json", POSITION)
    verdict = judge(
        Gate(rules=[r for r in RULES if r.metric.startswith("integrity/")], more_rules=[], not_asked=[]),
        scores=read(tmp_path / "scores"),
    )
    refused = {r["name"]: r["reason"] for r in verdict["rules"] if not r["passed"]}
    assert not verdict["passed"]
    assert reason in refused[FACTS[fact]]


def test_end_marks_may_stand_in_the_config_alone(base, extended):
    (extended / "generation_config.json").unlink()
    assert measure(base, extended=extended, position=POSITION)["integrity"]["tokenizer"]["value"] == 1


def test_a_base_that_is_only_rounded_was_not_trained(base, tmp_path):
    """A config may name fewer bits than its weights have; the merge writes as many as it names."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    assert not trained(base, extended=tmp_path / "rounded", prefix="model.").value


def test_weights_are_compared_with_those_of_a_base_that_was_saved_without_its_head(base, extended, tmp_path):
    shutil.copytree(base, tmp_path / "headless")
    tensors = {name.removeprefix("model."): t for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "headless/model.safetensors", metadata={"format": "pt"})
    fact = measure(tmp_path / "headless", extended=extended, position=POSITION)["integrity"]["trained"]
    assert fact["reason"].startswith("1 of 21 tensors differs")


@pytest.mark.parametrize("method", ["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"])
def test_every_method_is_recognised_in_the_config_it_writes_and_in_no_others(method, base, extended):
    extend(AutoConfig.from_pretrained(base), method=method, context=320).save_pretrained(extended)
    for asked in ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"):
        facts = measure(base, extended=extended, position=Position(method=asked, context=320))["integrity"]
        assert facts["rope"]["value"] == (asked == method)
        assert facts["context"]["value"] == ((asked == "dynamic") == (method == "dynamic"))


def test_the_same_folder_gives_the_same_bytes(base, extended, tmp_path):
    for name in ("a", "b"):
        stage(base, extended, tmp_path / name / "integrity.json", POSITION)
    assert (tmp_path / "a/integrity.json").read_bytes() == (tmp_path / "b/integrity.json").read_bytes()
