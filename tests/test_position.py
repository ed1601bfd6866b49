"""position.py against the papers' formulas, written here in float64, and against the frequencies of the models built from it."""

import logging
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.model.position import Position, extend, varies

THETA, WINDOW, CONTEXT, DIM = 5000.0, 96, 480, 24  # s = 5
S = CONTEXT / WINDOW


PHI3_LONG = {
    "hidden_size": 48,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "original_max_position_embeddings": 96,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 12,
        "long_factor": [2.0] * 12,
    },
}


DEEPSEEK = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
DEEPSEEK |= {"mscale": 1.0, "mscale_all_dim": 1.0}


def llama(**rope: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11,
        hidden_size=48,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=DIM,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_theta": THETA, "rope_type": "default"} | rope,
    )


BASES = {
    "plain": llama(),
    "linear": llama(rope_type="linear", factor=3.0),
    "yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=24),
    "llama3": llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48
    ),
}


def plain(theta: float = THETA, d: int = DIM) -> list[float]:
    """RoFormer: theta^(-2i/d)."""
    return [theta ** (-2 * i / d) for i in range(d // 2)]


def by_turns(frequencies: list[float], *, window: float, s: float, slow: float, fast: float) -> list[float]:
    """YaRN's eq. for h(theta), and Llama 3.1's: whole below `slow` turns in the window, untouched above `fast`."""
    result = []
    for f in frequencies:
        gamma = (window / (2 * math.pi / f) - slow) / (fast - slow)
        gamma = min(1.0, max(0.0, gamma))
        result.append((1 - gamma) * f / s + gamma * f)
    return result


def yarn_by_index(*, window: float, s: float, d: int = DIM, theta: float = THETA) -> list[float]:
    """YaRN as its authors' code has it: the ramp runs over the index between the two dimensions that turn 32 times and once."""
    at = lambda turns: d * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(at(32)), 0), min(math.ceil(at(1)), d - 1)
    result = []
    for i, f in enumerate(plain(theta, d)):
        interpolated = min(1.0, max(0.0, (i - low) / (high - low)))
        result.append(f / s * interpolated + f * (1 - interpolated))
    return result


def warmth(s: float) -> float:
    """YaRN's temperature, as a factor on cosine and sine."""
    return 0.1 * math.log(s) + 1


def rotation(config: PreTrainedConfig) -> tuple[list[float], float]:
    """The frequencies of the built model, and its factor on cosine and sine."""
    model = (GPTNeoXForCausalLM if isinstance(config, GPTNeoXConfig) else LlamaForCausalLM)(config)
    rotary = model.base_model.rotary_emb
    return rotary.inv_freq.double().tolist(), rotary.attention_scaling


def longrope(config: PreTrainedConfig) -> tuple[list[float], list[float], float]:
    """The frequencies of the built model after a text as long as the window and after one longer by a token, and its factor."""
    model = LlamaForCausalLM(config)
    found = []
    for length in (WINDOW, WINDOW + 1):
        model(torch.zeros(1, length, dtype=torch.long))
        found.append(model.model.rotary_emb.inv_freq.double().tolist())
    return *found, model.model.rotary_emb.attention_scaling


LLAMA3_BASE = by_turns(plain(), window=48, s=8, slow=1, fast=4)
YARN_BASE = yarn_by_index(window=24, s=4)
EXPECTED = {
    ("plain", "none"): (plain(), 1),
    ("plain", "linear"): ([f / S for f in plain()], 1),
    ("plain", "ntk"): (plain(THETA * S ** (DIM / (DIM - 2))), 1),
    ("plain", "dynamic"): (plain(), 1),
    ("plain", "yarn"): (yarn_by_index(window=WINDOW, s=S), warmth(S)),
    ("plain", "llama3"): (by_turns(plain(), window=WINDOW, s=S, slow=1, fast=4), 1),
    ("linear", "linear"): ([f / 3 / S for f in plain()], 1),
    ("linear", "ntk"): ([f / 3 for f in plain(THETA * S ** (DIM / (DIM - 2)))], 1),
    ("linear", "yarn"): (by_turns([f / 3 for f in plain()], window=WINDOW, s=S, slow=1, fast=32), warmth(S)),
    ("linear", "llama3"): (by_turns([f / 3 for f in plain()], window=WINDOW, s=S, slow=1, fast=4), 1),
    ("yarn", "linear"): ([f / S for f in YARN_BASE], warmth(4)),
    ("yarn", "yarn"): (yarn_by_index(window=24, s=CONTEXT / 24), warmth(CONTEXT / 24)),
    ("yarn", "ntk"): ([f * S ** (-2 * i / (DIM - 2)) for i, f in enumerate(YARN_BASE)], warmth(4)),
    ("llama3", "linear"): ([f / S for f in LLAMA3_BASE], 1),
    ("llama3", "ntk"): ([f * S ** (-2 * i / (DIM - 2)) for i, f in enumerate(LLAMA3_BASE)], 1),
    ("llama3", "yarn"): (by_turns(LLAMA3_BASE, window=WINDOW, s=S, slow=1, fast=32), warmth(S)),
    ("llama3", "llama3"): (by_turns(plain(), window=48, s=8 * S, slow=1, fast=4), 1),
}


@pytest.mark.parametrize(("base", "method"), EXPECTED)
def test_a_model_turns_at_the_frequencies_of_the_paper(base, method):
    frequencies, scaling = rotation(extend(BASES[base], method=method, context=CONTEXT))
    expected, temperature = EXPECTED[base, method]
    assert frequencies == pytest.approx(expected, rel=2e-6)
    assert scaling == pytest.approx(temperature, rel=1e-6)


@pytest.mark.parametrize(("base", "method"), EXPECTED)
def test_a_saved_config_reloads_to_the_same_rotation(base, method, tmp_path):
    config = extend(BASES[base], method=method, context=CONTEXT)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.rope_parameters == config.rope_parameters
    assert reloaded.max_position_embeddings == (WINDOW if method == "dynamic" else CONTEXT)
    assert rotation(reloaded) == rotation(config)


@pytest.mark.parametrize("method", ["linear", "ntk", "dynamic", "yarn", "llama3", "longrope"])
def test_transformers_has_nothing_to_warn_of(method, caplog, monkeypatch):
    """It says it of a config as it is built and saved, and a reader of the log would take it for a fault of the settings."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name, base in BASES.items():
        if method != "dynamic" or name == "plain":
            LlamaForCausalLM(extend(base, method=method, context=CONTEXT)).config.validate()
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3", "longrope"])
def test_vllm_finds_the_factor_on_cosine_and_sine_where_it_looks(method):
    """It does not read `attention_factor` under longrope (`tests/test_vllm.py` holds what it computes to transformers')."""
    configs = [extend(base, method=method, context=CONTEXT) for base in BASES.values()]
    by_frequency = [c for c in configs if c.rope_parameters["rope_type"] == "longrope"]
    assert by_frequency
    for config in by_frequency:
        assert config.rope_parameters["short_mscale"] == config.rope_parameters["long_mscale"] == rotation(config)[1]


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3"])
def test_frequencies_do_not_depend_on_the_length_that_is_read(method):
    for base in BASES.values():
        model = LlamaForCausalLM(extend(base, method=method, context=CONTEXT))
        before = model.model.rotary_emb.inv_freq.clone()
        for length in (7, CONTEXT):
            model(torch.zeros(1, length, dtype=torch.long))
            torch.testing.assert_close(model.model.rotary_emb.inv_freq, before, rtol=0, atol=0)


def test_dynamic_is_plain_inside_the_window_and_a_larger_base_beyond():
    model = LlamaForCausalLM(extend(BASES["plain"], method="dynamic", context=CONTEXT))
    model(torch.zeros(1, WINDOW, dtype=torch.long))
    assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx(plain(), rel=2e-6)
    length = 300
    model(torch.zeros(1, length, dtype=torch.long))
    grown = THETA * (S * length / WINDOW - (S - 1)) ** (DIM / (DIM - 2))
    assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx(plain(grown), rel=2e-6)


@pytest.mark.parametrize("name", BASES)
def test_longrope_is_the_base_inside_the_window_and_llama3_beyond(name, tmp_path):
    own, warm = rotation(BASES[name])
    extended = extend(BASES[name], method="longrope", context=CONTEXT)
    extended.save_pretrained(tmp_path)
    inside, beyond, scaling = longrope(AutoConfig.from_pretrained(tmp_path))
    assert inside == pytest.approx(own, rel=2e-6)
    assert beyond == pytest.approx(by_turns(own, window=WINDOW, s=S, slow=1, fast=4), rel=2e-6)
    assert (scaling, extended.max_position_embeddings) == (pytest.approx(warm), CONTEXT)


def test_under_longrope_short_texts_are_read_as_by_the_base_and_long_ones_as_under_llama3():
    tokens = torch.randint(0, 11, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    logits = {}
    for method in ("none", "longrope", "llama3"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(extend(BASES["plain"], method=method, context=CONTEXT)).eval()
        with torch.no_grad():
            logits[method] = [model(tokens[:, :length]).logits for length in (WINDOW, CONTEXT)]
    assert logits["longrope"][0].equal(logits["none"][0])
    torch.testing.assert_close(logits["longrope"][1], logits["llama3"][1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits["longrope"][1], logits["none"][1], atol=1e-3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BASES["plain"], False),
        (extend(BASES["yarn"], method="ntk", context=CONTEXT), False),  # longrope with one list
        (extend(BASES["plain"], method="dynamic", context=CONTEXT), True),
        (extend(BASES["plain"], method="longrope", context=CONTEXT), True),
        (GPT2Config(), False),
    ],
    ids=["plain", "one list", "dynamic", "longrope", "no rotation"],
)
def test_whether_the_length_of_a_text_decides(config, said):
    assert varies(config) == said


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_extending_in_one_step_or_two_is_the_same(method):
    twice = extend(extend(BASES["plain"], method=method, context=240), method=method, context=CONTEXT)
    once = extend(BASES["plain"], method=method, context=CONTEXT)
    assert rotation(twice)[0] == pytest.approx(rotation(once)[0], rel=2e-6)
    assert rotation(twice)[1] == pytest.approx(rotation(once)[1])


def test_only_the_rotated_share_of_a_head_counts():
    base = GPTNeoXConfig(
        vocab_size=11,
        hidden_size=96,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_theta": THETA, "rope_type": "default", "partial_rotary_factor": 0.25},
    )
    d = 12
    ntk = extend(base, method="ntk", context=CONTEXT)
    assert rotation(ntk)[0] == pytest.approx(plain(THETA * S ** (d / (d - 2)), d), rel=2e-6)
    yarn = extend(base, method="yarn", context=CONTEXT)
    assert rotation(yarn)[0] == pytest.approx(yarn_by_index(window=WINDOW, s=S, d=d), rel=2e-6)
    composed = extend(extend(base, method="linear", context=240), method="yarn", context=CONTEXT)
    halved = [f * WINDOW / 240 for f in plain(d=d)]
    assert rotation(composed)[0] == pytest.approx(by_turns(halved, window=240, s=2, slow=1, fast=32), rel=2e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", [f / S for f in plain()]),
        ("ntk", plain(THETA * S ** (DIM / (DIM - 2)))),
        ("yarn", by_turns(plain(), window=WINDOW, s=S, slow=1, fast=32)),
        ("llama3", by_turns(plain(), window=WINDOW, s=S, slow=1, fast=4)),
    ],
)
def test_phi3_takes_a_method_frequency_by_frequency(method, expected, tmp_path):
    """Its config refuses every kind but longrope, and only when it is saved."""
    sizes = {
        "vocab_size": 11,
        "hidden_size": 2 * DIM,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
    }
    base = Phi3Config(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        original_max_position_embeddings=WINDOW,
        rope_parameters={"rope_theta": THETA, "rope_type": "default"},
    )
    extended = extend(base, method=method, context=CONTEXT)
    extended.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert (found.rope_parameters, found.max_position_embeddings) == (extended.rope_parameters, CONTEXT)
    rotary = Phi3ForCausalLM(found).model.rotary_emb
    assert rotary.inv_freq.double().tolist() == pytest.approx(expected, rel=2e-6)
    assert rotary.attention_scaling == pytest.approx(warmth(S) if method == "yarn" else 1)
    with pytest.raises(ValueError, match="'dynamic' is none that a phi3 model takes: .*must be one of"):
        extend(base, method="dynamic", context=CONTEXT)


def test_phi3_goes_by_the_window_that_it_reaches_not_by_the_original_one_that_its_config_says(tmp_path):
    """A config.json that is silent on it says 4,096."""
    base = Phi3Config(
        **{**PHI3_LONG, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}},
        **{"vocab_size": 11, "intermediate_size": 20, "num_hidden_layers": 1, "max_position_embeddings": WINDOW},
    )
    base.original_max_position_embeddings = 4096
    extend(base, method="longrope", context=CONTEXT).save_pretrained(tmp_path)
    model = Phi3ForCausalLM(AutoConfig.from_pretrained(tmp_path))
    for length, due in ((WINDOW, plain()), (WINDOW + 1, by_turns(plain(), window=WINDOW, s=S, slow=1, fast=4))):
        model(torch.zeros(1, length, dtype=torch.long))
        assert model.model.rotary_emb.inv_freq.double().tolist() == pytest.approx(due, rel=2e-6)


def test_a_config_that_leaves_the_width_of_a_head_open_is_extended_too():
    base = MixtralConfig(hidden_size=48, num_attention_heads=2, max_position_embeddings=WINDOW)
    assert base.head_dim is None
    yarn = extend(base, method="yarn", context=CONTEXT)
    found, _ = ROPE_INIT_FUNCTIONS["yarn"](yarn)
    assert found.tolist() == pytest.approx(
        yarn_by_index(window=WINDOW, s=S, theta=base.rope_parameters["rope_theta"]), rel=2e-6
    )


def test_the_window_of_a_yarn_base_is_its_original_window_times_its_factor():
    """Qwen's configs leave max_position_embeddings at the original window."""
    base = Qwen3Config(
        max_position_embeddings=64,
        rope_parameters={
            "rope_theta": THETA,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    with pytest.raises(ValueError, match="256"):
        extend(base, method="yarn", context=200)
    assert extend(base, method="yarn", context=512).rope_parameters["factor"] == 8


def test_the_window_of_a_linear_base_is_what_it_says_beside_its_original_window(tmp_path):
    """Vicuna 1.5 16k: 4,096 positions, a factor of 4 and a maximum sequence length of 16,384."""
    base = llama(rope_type="linear", factor=4.0)
    base.max_sequence_length = 4 * WINDOW
    with pytest.raises(ValueError, match=rf"{2 * WINDOW} must be above the {4 * WINDOW}"):
        extend(base, method="linear", context=2 * WINDOW)
    extend(base, method="linear", context=8 * WINDOW).save_pretrained(tmp_path)
    extended = AutoConfig.from_pretrained(tmp_path)
    assert extended.rope_parameters["factor"] == 8
    assert extended.max_position_embeddings == extended.max_sequence_length == 8 * WINDOW


def test_extending_leaves_the_given_config_alone():
    before = BASES["plain"].to_dict()
    extend(BASES["plain"], method="yarn", context=CONTEXT)
    assert BASES["plain"].to_dict() == before


def test_no_method_keeps_the_rotation_and_says_the_context():
    assert extend(BASES["plain"], method="none", context=CONTEXT).max_position_embeddings == CONTEXT
    assert extend(BASES["plain"], method="none", context=50).max_position_embeddings == WINDOW


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 24},
        {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
        | {"original_max_position_embeddings": 24},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_no_method_keeps_a_scaling_that_goes_by_the_length_in_the_config(rope, tmp_path):
    extend(llama(**rope), method="none", context=CONTEXT).save_pretrained(tmp_path)
    kept, found = AutoConfig.from_pretrained(tmp_path), []
    for config in (kept, llama(**rope)):
        model = LlamaForCausalLM(config)
        for length in (20, WINDOW, 300):
            model(torch.zeros(1, length, dtype=torch.long))
            found.append((model.model.rotary_emb.inv_freq.tolist(), model.model.rotary_emb.attention_scaling))
    assert found[:3] == found[3:]
    assert kept.max_position_embeddings == (WINDOW if rope["rope_type"] == "dynamic" else CONTEXT)


@pytest.mark.parametrize("context", [WINDOW, WINDOW - 1])
def test_a_context_within_the_window_is_refused_with_both_numbers(context):
    with pytest.raises(ValueError, match=rf"{context} must be above the {WINDOW}"):
        extend(BASES["plain"], method="linear", context=context)


@pytest.mark.parametrize(
    ("base", "method", "words"),
    [
        (BASES["linear"], "dynamic", "'dynamic' cannot be put on a base under 'linear'"),
        (llama(rope_type="dynamic", factor=2.0), "yarn", "'yarn' cannot be put on a base under 'dynamic'"),
        (Gemma3TextConfig(), "linear", "per layer type .*full_attention"),
        (Olmo3Config(), "linear", "per layer type .*full_attention"),
        (Phi3Config(**PHI3_LONG), "yarn", "'yarn' cannot be put on a base under 'longrope'"),
        *[
            (DeepseekV3Config(rope_parameters=DEEPSEEK), method, "by whose mscale_all_dim its attention .*: take yarn")
            for method in ("linear", "ntk", "llama3", "longrope")
        ],
        (GPT2Config(), "linear", "gpt2 model has no rotary positions"),
    ],
)
def test_what_can_not_be_extended_is_refused_by_name(base, method, words):
    with pytest.raises(ValueError, match=words):
        extend(base, method=method, context=10**6)


@pytest.mark.parametrize(
    ("method", "context", "words"),
    [
        ("Yarn", CONTEXT, "position.method = 'Yarn' is none of none, linear, ntk, dynamic, yarn, llama3, longrope"),
        ("yarn", float(CONTEXT), "position.context = 480.0 is no whole number of tokens"),
    ],
)
def test_what_is_no_method_or_no_context_is_refused_outside_of_a_section_too(method, context, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        extend(llama(), method=method, context=context)


def test_a_context_may_be_numpys_whole_number():
    assert extend(llama(), method="yarn", context=np.int64(CONTEXT)).max_position_embeddings == CONTEXT


def test_a_context_of_one_token_is_no_section():
    with pytest.raises(ValueError):
        Position(method="linear", context=1)
