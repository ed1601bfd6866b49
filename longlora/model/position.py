"""A longer reach for rotary positions: the model's own settings, rewritten before the model is built.

linear: Chen et al. 2023, arXiv 2306.15595. ntk: the "NTK-aware" change of base, and its dynamic form. yarn: Peng et al. 2023,
arXiv 2309.00071. llama3: Llama 3.1's smooth variant. longrope: other frequencies for texts beyond the window, as LongRoPE (Ding et
al. 2024, arXiv 2402.13753) and Phi-3 have them, here llama3's and not searched ones. The result is a plain transformers config, so
whatever reads the saved model sees it. tests/test_position.py holds the frequencies to formulas written from the papers in
float64, and to the model's.

Letters: W window that the base reaches; s = context / W; d rotated dimensions of a head; F = d/2 frequencies.
"""

import copy
import logging
import math
import operator
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from pydantic import Field
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.section import Section

Method = Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"]
Rope = dict[str, Any]

# What vLLM reads instead of `attention_factor`, without which it puts LongRoPE's own factor in its place: perplexity, and no error,
# would tell. transformers does not know these keys, and says so at every turn, which no user can act upon.
VLLM_KEYS = ("short_mscale", "long_mscale")
logging.getLogger("transformers.modeling_rope_utils").addFilter(
    lambda record: not ("Unrecognized keys" in (said := record.getMessage()) and all(key in said for key in VLLM_KEYS))
)

READ_BY_ATTENTION = ("mscale_all_dim", "llama_4_scaling_beta")
"""What families (DeepSeek, Mistral) read of a yarn base's settings besides: a factor on the scores, which depends on yarn's own."""

ORIGINAL = "original_max_position_embeddings"

# yarn and llama3 leave a frequency alone that turns more often than this in the window, and interpolate one that turns less.
YARN_SLOW, YARN_FAST = 1.0, 32.0
LLAMA3_SLOW, LLAMA3_FAST = 1.0, 4.0


class Position(Section):
    method: Method
    """How the base's rotary frequencies change; see longlora/model/position.py."""
    context: int = Field(gt=1)
    """Tokens that the model shall reach, which is also the length of a training sequence."""


def extend(config: PreTrainedConfig, *, method: Method, context: int) -> PreTrainedConfig:
    """A copy of `config` that reaches `context` tokens by `method`. Build the model from it: frequencies are fixed at birth.

    The window W of the base is what its `max_position_embeddings` says, or factor x original window where its yarn says more, or
    `max_sequence_length` beside linear scaling (Vicuna, LongChat).
    On a base that is scaled already, the method works on the frequencies the base has:

    - linear on linear, llama3 on llama3: the factors multiply. ntk on a plain or linear base: theta multiplies.
    - yarn on yarn: the factor is context / the original window, as yarn is meant to be read.
    - linear, ntk, yarn or llama3 on another scaling, or in a family that takes no other (Phi-3): frequency by frequency, written
      as transformers' `longrope`, the form in which it takes any frequencies.

    longrope leaves a text of up to W tokens as the base reads it, and turns all of a longer one at llama3's frequencies.

    ntk is a larger base, theta x s^(d/(d-2)). dynamic does the same as a sequence grows past W, and is the one scaling, a base's
    own too, that leaves `max_position_embeddings` at W: that is where transformers looks W up.

    Raises:
        ValueError: a method that there is not, or a context that is no whole number; the context is not longer than the window
            (which `none` allows); no rotary positions, or some per layer type; a base under a scaling that depends on the length
            (dynamic, longrope); a method that the family does not take.
    """
    if method not in get_args(Method):
        raise ValueError(f"position.method = {method!r} is none of {', '.join(get_args(Method))}")
    try:
        context = operator.index(context)  # of a script that no type checker read
    except TypeError:
        raise ValueError(f"position.context = {context!r} is no whole number of tokens") from None
    extended = copy.deepcopy(config)
    text = extended.get_text_config()
    rope = rotary(text)
    if getattr(text, "head_dim", 0) is None:  # Mixtral's, which transformers' yarn multiplies by
        text.head_dim = text.hidden_size // text.num_attention_heads
    window = reach(text)
    if method == "none":
        if rope["rope_type"] != "dynamic" and (stated := max(window, context)) != text.max_position_embeddings:
            text.rope_parameters, text.max_position_embeddings = rope, stated
        return extended
    if context <= window:
        raise ValueError(
            f"position.context = {context} must be above the {window} that the base reaches, or method: none"
        )
    scaled = lengthened(text, rope, method=method, window=window, context=context)
    stated = window if method == "dynamic" else context
    if method != "dynamic" and complaint(text, scaled, length=stated):
        scaled = by_frequency(text, rope, method=method, window=window, s=context / window)
    if wrong := complaint(text, scaled, length=stated):
        raise ValueError(f"position.method '{method}' is none that a {text.model_type} model takes: {wrong}")
    text.rope_parameters = scaled
    text.max_position_embeddings = stated
    said = text.to_dict()
    if "max_sequence_length" in said:
        text.max_sequence_length = stated
    if ORIGINAL in said and ORIGINAL in scaled:  # Phi-3's, which transformers reads before the one among the settings
        text.original_max_position_embeddings = scaled[ORIGINAL]
    return extended


def complaint(config: PreTrainedConfig, rope: Rope, *, length: int) -> str | None:
    """What transformers' config has against the rotary settings for a `length`; None: nothing. It would say so when the config is
    saved, which is after the training."""
    stated = copy.deepcopy(config)
    stated.rope_parameters, stated.max_position_embeddings = dict(rope), length
    try:
        stated.validate()
    except StrictDataclassClassValidationError as error:
        return str(error.__cause__)
    return None


def rotary(config: PreTrainedConfig) -> Rope:
    """The rotary settings, one for all layers, with the factor that transformers else derives from the length in `config`, and
    anew from another length."""
    rope = config.to_dict().get("rope_parameters")
    if not rope:
        raise ValueError(f"a {config.model_type} model has no rotary positions, so its context cannot be extended")
    nested = config.nested_rope_parameter_keys(rope)
    if nested:
        raise ValueError(
            f"this {config.model_type} model has rotary settings per layer type ({', '.join(nested)}); "
            "only models with one setting for all layers can be extended"
        )
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = config.max_position_embeddings / rope[ORIGINAL]
    return rope


def reach(config: PreTrainedConfig) -> int:
    """W. Some yarn configs, such as Qwen's, keep the original window in `max_position_embeddings`; so do Vicuna's linear ones."""
    rope = rotary(config)
    if rope["rope_type"] == "yarn":
        return max(config.max_position_embeddings, round(rope["factor"] * rope[ORIGINAL]))
    if rope["rope_type"] == "linear":
        return max(config.max_position_embeddings, config.to_dict().get("max_sequence_length", 0))
    return config.max_position_embeddings


def lengthened(config: PreTrainedConfig, rope: Rope, *, method: Method, window: int, context: int) -> Rope:
    """The rotary settings for `context`."""
    kind, s = rope["rope_type"], context / window
    if kind not in ("default", "linear", "yarn", "llama3") or (method == "dynamic" and kind != "default"):
        raise ValueError(f"position.method '{method}' cannot be put on a base under '{kind}' scaling")
    if method == "linear" and kind in ("default", "linear"):
        return rope | {"rope_type": "linear", "factor": rope.get("factor", 1.0) * s}
    if method == "ntk" and kind in ("default", "linear"):
        d = 2 * len(frequencies(config, rope)[0])
        return rope | {"rope_theta": rope["rope_theta"] * s ** (d / (d - 2))}
    if method == "dynamic":
        return rope | {"rope_type": "dynamic", "factor": s}
    if method == "llama3" and kind in ("default", "llama3"):
        fresh = {"low_freq_factor": LLAMA3_SLOW, "high_freq_factor": LLAMA3_FAST, ORIGINAL: window}
        return fresh | rope | {"rope_type": "llama3", "factor": rope.get("factor", 1.0) * s}
    if method == "yarn" and kind in ("default", "yarn"):
        original = rope.get(ORIGINAL, window)
        kept = {key: value for key, value in rope.items() if key != "attention_factor"}  # it follows from the factor
        return kept | {"rope_type": "yarn", "factor": context / original, ORIGINAL: original}
    return by_frequency(config, rope, method=method, window=window, s=s)


def by_frequency(config: PreTrainedConfig, rope: Rope, *, method: Method, window: int, s: float) -> Rope:
    """`method` done to the frequencies of a base that is scaled already, as one factor per frequency."""
    if read := [key for key in READ_BY_ATTENTION if rope.get(key)]:
        raise ValueError(
            f"position.method '{method}' cannot be put on a {config.model_type} base under '{rope['rope_type']}' scaling, by whose "
            f"{', '.join(read)} its attention scales the scores: take yarn"
        )
    own_F, temperature = frequencies(config, rope)
    stretch_F = stretch(own_F, method=method, window=window, s=s)
    plain_F, _ = frequencies(config, {"rope_type": "linear", "factor": 1.0} | unscaled(rope))
    factors_F = plain_F / own_F
    temperature *= 0.1 * math.log(s) + 1.0 if method == "yarn" else 1.0
    return unscaled(rope) | {
        "rope_type": "longrope",
        "short_factor": (factors_F if method == "longrope" else factors_F * stretch_F).tolist(),
        "long_factor": (factors_F * stretch_F).tolist(),
        "factor": s,
        "attention_factor": temperature,
        **dict.fromkeys(VLLM_KEYS, temperature),
        ORIGINAL: window,
    }


def stretch(own_F: torch.Tensor, *, method: Method, window: int, s: float) -> torch.Tensor:
    """By how much each frequency is divided."""
    if method == "linear":
        return torch.full_like(own_F, s)
    if method == "ntk":
        return s ** (torch.arange(len(own_F), dtype=torch.float64) / (len(own_F) - 1))
    slow, fast = (YARN_SLOW, YARN_FAST) if method == "yarn" else (LLAMA3_SLOW, LLAMA3_FAST)
    turns_F = window * own_F / (2 * math.pi)
    kept_F = ((turns_F - slow) / (fast - slow)).clamp(0, 1)
    return 1 / (kept_F + (1 - kept_F) / s)


def varies(config: PreTrainedConfig) -> bool:
    """Whether a text's length decides how its tokens are turned; without rotary positions none are."""
    rope = config.to_dict().get("rope_parameters") or {}
    return rope.get("rope_type") == "dynamic" or rope.get("short_factor") != rope.get("long_factor")


def read_afresh(model: PreTrainedModel) -> None:
    """Have every text read as by a model that was just opened. Under dynamic scaling transformers keeps the frequencies of the
    longest text so far for all others beyond the window: a score would depend on what was read before, and a training that
    resumes would go on as another one."""
    rope = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    if rope.get("rope_type") == "dynamic":
        for name, module in model.named_modules():
            if name.endswith("rotary_emb"):
                module.register_forward_pre_hook(forget, with_kwargs=True)


def forget(rotary: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Back to the window's frequencies where a text begins; what goes on over a cache keeps them."""
    positions_BL = named["position_ids"] if "position_ids" in named else given[1]
    if not positions_BL.min():
        rotary.inv_freq = rotary.original_inv_freq
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def unscaled(rope: Rope) -> Rope:
    return {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}


def frequencies(config: PreTrainedConfig, rope: Rope) -> tuple[torch.Tensor, float]:
    """F frequencies in float64 (of transformers' float32), and the factor on cosine and sine, under the settings `rope`."""
    stated = copy.deepcopy(config)
    stated.rope_parameters = dict(rope)
    if rope["rope_type"] == "default":  # not in transformers' table, and the same as linear by 1
        stated.rope_parameters = rope | {"rope_type": "linear", "factor": 1.0}
    own_F, temperature = ROPE_INIT_FUNCTIONS[stated.rope_parameters["rope_type"]](stated)
    return own_F.double(), float(temperature)
