"""What cannot be opened or read is said in one line, by the folder's name; what can be read is read beyond the config's number."""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from specimens import FLOAT32, folder
from test_passkey import byte_level, settings, tiny
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from longlora.evaluation.answer import answers
from longlora.evaluation.passkey import measure
from longlora.evaluation.windows import Window, nats
from longlora.model import load
from longlora.model.load import SMALL, Precision, gpus, must_reach, open_model, open_tokenizer, spread
from longlora.model.position import extend
from longlora.stages import passkey as stages_passkey

torch.set_num_threads(1)  # matrices this small are slower on two


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("plain") / "whole")


def cut(place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def stated(place: Path, **said: object) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | said))


def strange(place: Path) -> None:
    stated(place, model_type="strange")


def quantised(place: Path) -> None:
    """In a way whose package is not installed."""
    stated(place, quantization_config={"quant_method": "aqlm", "in_group_size": 8})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "incomplete metadata"),
        (quantised, "aqlm"),
        (strange, "has model type `strange`"),
        (lambda place: (place / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda place: (place / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda place: stated(place, hidden_act="odd"), "KeyError: 'odd'"),
        (lambda place: stated(place, num_attention_heads=0), "modulo by zero"),
        (lambda place: stated(place, hidden_size=40), "validate_architecture': ValueError: The hidden size"),
        (lambda place: (place / "generation_config.json").write_text("[]"), "'list' object is not a mapping"),
    ],
)
def test_a_model_that_does_not_open_is_named_with_the_reason_in_one_line(whole, tmp_path, harm, said):
    shutil.copytree(whole, tmp_path / "odd")
    harm(tmp_path / "odd")
    with pytest.raises(ValueError, match=f"the model at .*odd does not open: .*{said}") as error:
        open_model(tmp_path / "odd")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tied", "name", "instead"),
    [
        (True, "model.norm.weight", None),
        (True, "model.layers.1.self_attn.k_proj.weight", torch.ones(12, 35)),
        (False, "lm_head.weight", None),
    ],
)
def test_a_model_that_lacks_a_weight_or_has_one_of_another_size_is_refused_and_a_tied_head_is_none(
    tied, name, instead, tmp_path
):
    """transformers puts one by chance in its place, and the scores would be that one's."""
    file = folder(tmp_path / "odd", tied=tied) / "model.safetensors"
    weights = load_file(file)
    assert ("lm_head.weight" in weights) != tied
    open_model(tmp_path / "odd")
    save_file({n: w for n, w in (weights | {name: instead}).items() if w is not None}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"the model at .*odd lacks weights .* or has .* other sizes: 1, {name} first$"
    ):
        open_model(tmp_path / "odd")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_does_not_open_is_named(whole, tmp_path, text):
    shutil.copytree(whole, tmp_path / "odd")
    (tmp_path / "odd/tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"the tokenizer at .*odd does not open: "):
        open_tokenizer(tmp_path / "odd")


SIZES = {"vocab_size": 340, "num_hidden_layers": 1, "num_attention_heads": 3}


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=340, n_positions=64, n_embd=24, n_layer=1, n_head=3)).eval(),
        OPTForCausalLM(
            OPTConfig(**SIZES, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, max_position_embeddings=64)
        ).eval(),
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
        stages_passkey.stage(tmp_path / "odd", tmp_path / "odd.json", settings(lengths=[310]), FLOAT32)


def test_rotary_positions_do_not_end(whole):
    model = open_model(whole)
    assert isinstance(model, LlamaForCausalLM) and model.config.max_position_embeddings == 64
    must_reach(model, 5000)


def test_a_model_in_training_mode_is_not_measured(whole):
    model, words = open_model(whole).train(), open_tokenizer(whole)
    with pytest.raises(ValueError, match=r"training mode, .* measure after model.eval\(\)"):
        measure(model, label="odd", tokenizer=words, settings=settings(lengths=[310]))
    with pytest.raises(ValueError, match="training mode"):
        nats(model, documents=[np.arange(90)], windows=[Window(0, 0, 80, 9)])
    measure(model.eval(), label="whole", tokenizer=words, settings=settings(lengths=[310]))


class Spied:
    """Work that says by which thread it is done, and how."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bool]] = []

    def work(self, batch: int) -> None:
        self.seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        time.sleep(0.002)
        if batch == 5:
            raise ValueError("batch 5")


@pytest.mark.parametrize(
    ("hidden_size", "rope_type", "own"),
    [(24, "default", True), (3 * SMALL, "default", False), (24, "dynamic", False)],
)
def test_batches_of_a_small_model_are_dealt_out_to_threads_that_compute_alone(hidden_size, rope_type, own):
    rotary = {"rope_type": rope_type, "rope_theta": 1e4} | ({"factor": 4.0} if rope_type == "dynamic" else {})
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_size=hidden_size, intermediate_size=8, head_dim=8, rope_parameters=rotary)
    )
    spied, main = Spied(), threading.current_thread().name
    torch.set_num_threads(2)
    try:
        spread(spied.work, range(5), model=model)
        assert [threads for _, threads, _ in spied.seen] == [1 if own else 2] * 5
        assert all(inference for _, _, inference in spied.seen)
        assert all((name != main) is own for name, _, _ in spied.seen)
        with pytest.raises(ValueError, match="batch 5"):
            spread(spied.work, range(100), model=model)
        assert len(spied.seen) < 5 + 50 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_threads_measure_what_one_measures():
    model = tiny()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(measure(model, label="m", tokenizer=byte_level(), settings=settings(samples=8)))
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_a_score_does_not_depend_on_the_texts_that_were_read_before(method, whole, tmp_path):
    """The window is 64 tokens: the second length lies beyond it, and is not the longest."""
    extend(AutoConfig.from_pretrained(whole), method=method, context=512).save_pretrained(place := tmp_path / "model")
    for file in whole.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, place / file.name)
    texts = [np.arange(512) * 7 % 300]
    windows = [Window(0, 0, length, 8) for length in (512, 128, 65, 64)]
    alone = [nats(open_model(place), documents=texts, windows=[window])[0] for window in windows]
    model = open_model(place)
    assert [nats(model, documents=texts, windows=[window])[0] for window in windows] == alone
    (whole_text,) = answers(model, prompts=[texts[0][:60].tolist()], max_new_tokens=[12])
    assert answers(open_model(place), prompts=[texts[0][:60].tolist()], max_new_tokens=[12]) == [whole_text]


def test_of_several_processes_each_takes_its_own_gpu_which_may_be_the_only_one_it_sees(monkeypatch):
    assert gpus() == "auto"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for count, own in ((4, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert gpus() == {"": own}


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_tokens_see_those_after_them_is_refused(tied, tmp_path):
    """Its perplexity and its keys would be splendid: both are scored in one pass, in which the answer stands."""
    place = folder(tmp_path / "seer", tied=tied)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(ValueError, match="seer is no causal one: its tokens see those after them.*is_causal in its"):
        open_model(place)


@pytest.mark.parametrize("machine_has_a_gpu", [False, True])
def test_measures_compute_in_the_precision_of_params_yaml_whatever_the_machine(machine_has_a_gpu, whole, monkeypatch):
    """Scores are kept and fetched: a base in float32 beside a model in bfloat16 would be compared by their rounding, too."""
    monkeypatch.setattr(load.torch.cuda, "is_available", lambda: machine_has_a_gpu)
    monkeypatch.setattr(load, "gpus", lambda: "cpu")
    assert open_model(whole, Precision(dtype="bfloat16")).dtype == torch.bfloat16
    assert open_model(whole, FLOAT32).dtype == torch.float32
    assert open_model(whole).dtype == (torch.bfloat16 if machine_has_a_gpu else torch.float32)


def test_a_publishers_wishes_for_answers_are_left_out_but_for_the_end_marks(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "wishful")
    file = tmp_path / "wishful/generation_config.json"
    prompt, asked = [[3, 4, 5, 6, 7, 8]], {"max_new_tokens": [9]}
    plain = answers(open_model(whole), prompts=prompt, **asked)
    wishes = {"repetition_penalty": 9.0, "suppress_tokens": plain[0][:1], "num_beams": 3, "eos_token_id": [1, 2]}
    file.write_text(json.dumps(json.loads(file.read_text()) | wishes))
    model = open_model(tmp_path / "wishful")
    assert model.generation_config.eos_token_id == [1, 2]
    assert answers(model, prompts=prompt, **asked) == plain
