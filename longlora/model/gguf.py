"""A merged Llama as one GGUF file, which llama.cpp and what is built on it read.

GGUF is metadata by name, then tensors. Two things differ from transformers. llama.cpp's Llama turns neighbours (2i, 2i+1) of a
head, transformers' turns halves (i, i + d/2), so the rows of the query and key projections change places. And rotary scaling has
a form of its own: `linear` and `yarn` by factor, any other fixed frequencies as a divisor for each (`rope_freqs`), and those
of `longrope` as two lists of divisors, of which llama.cpp takes one when it opens the file.
tests/test_gguf.py holds files to a forward pass written from ggml's definition, to transformers' reading of GGUF, and to
llama.cpp itself where it is installed.

Letters: H heads, D dimensions of one, F = D/2 frequencies, N columns.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFType, LlamaFileType, RopeScalingType, get_tensor_name_map
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from longlora.model.gguf_tokenizer import Writer, add_words, words_of
from longlora.model.load import open_tokenizer
from longlora.model.position import YARN_FAST, YARN_SLOW, frequencies, reach, rotary, unscaled, varies

Dtype = Literal["f32", "f16", "bf16"]
KINDS: dict[Dtype, tuple[torch.dtype, GGMLQuantizationType, LlamaFileType]] = {
    "f32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


class Rotation(NamedTuple):
    """How llama.cpp is to turn."""

    scaling: RopeScalingType | None
    factor: float
    window: int
    """The window before scaling, in tokens."""
    temperature: float
    """Beyond what llama.cpp's yarn multiplies cosine and sine by anyway, 0.1 ln(factor) + 1."""
    divisors: dict[str, torch.Tensor]
    """What each of the F frequencies is divided by, under the name of the tensor; empty: nothing is."""


def write(folder: Path, *, out: Path, dtype: Dtype | None = None) -> None:
    """Write the model in `folder` to the new file `out`, whole or not at all. Matrices in `dtype`, by default as they are stored;
    vectors in float32, as llama.cpp wants them.

    Raises:
        ValueError: the model is no Llama, or has a tokenizer or rotary scaling that llama.cpp would read otherwise; tensors are
            missing, of another shape, or too large for float16; `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: a GGUF file is written to a new name")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model at {folder} (no config.json there)")
    config = llama(folder)
    stored = shapes_must_fit(folder, config)
    chosen = dtype or stored_as(config)
    partial = out.with_name(f".{out.name}.partial")
    writer = Writer(partial, "llama")
    try:
        describe(writer, config, name=out.stem, dtype=chosen)
        add_words(writer, words_of(open_tokenizer(folder), size=config.vocab_size))
        write_tensors(writer, config, stored=stored, dtype=chosen)
        writer.close()
        partial.rename(out)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def llama(folder: Path) -> LlamaConfig:
    """The configuration of a model that llama.cpp's Llama computes.

    Raises:
        ValueError: it is another model, or a Llama that llama.cpp computes otherwise.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, LlamaConfig) or config.architectures not in (None, ["LlamaForCausalLM"]):
        raise ValueError(
            f"{folder} holds a {config.model_type} model ({', '.join(config.architectures or ['of no named class'])}): "
            "only LlamaForCausalLM is written as GGUF"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"{folder} has hidden_act '{config.hidden_act}': llama.cpp's Llama has silu")
    if rotary(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{folder} turns a part of each head only: llama.cpp's Llama turns all of it")
    return config


def changes_at(folder: Path) -> int | None:
    """The context, in tokens, up to which llama.cpp turns by the short list of divisors, and beyond which by the long one, whatever
    the text (transformers goes by the text); None: there are not two lists.

    Raises:
        ValueError: as `write`, of the configuration.
    """
    config = llama(folder)
    return rotation(config).window if varies(config) else None


def stored_as(config: LlamaConfig) -> Dtype:
    for name, (kind, _, _) in KINDS.items():
        if config.dtype == kind:
            return name
    raise ValueError(f"the weights are {config.dtype}: say f32, f16 or bf16")


def rotation(config: LlamaConfig) -> Rotation:
    """The rotary settings in llama.cpp's terms.

    Raises:
        ValueError: frequencies that are other ones at every length (`dynamic`), or a scaling that is not known here.
    """
    rope = rotary(config)
    # One that stands beside the settings counts before the one among them, as in transformers.
    original = config.to_dict().get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    kind, window = rope["rope_type"], original or config.max_position_embeddings
    if kind == "dynamic":
        raise ValueError(f"'{kind}' scaling changes with the length of a text, which llama.cpp's Llama does not")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise ValueError(f"'{kind}' scaling is not written as GGUF: default, linear, yarn, llama3 and longrope are")
    own_F, temperature = frequencies(config, rope)
    if kind == "default":
        return Rotation(None, 1.0, window, 1.0, {})
    if kind == "linear":
        return Rotation(RopeScalingType.LINEAR, rope["factor"], window, 1.0, {})
    if kind == "yarn" and usual_yarn(rope):
        own = temperature / (0.1 * math.log(rope["factor"]) + 1.0)
        return Rotation(RopeScalingType.YARN, rope["factor"], window, own, {})
    if kind == "longrope" and varies(config):
        lists = {
            f"rope_factors_{side}.weight": torch.tensor(rope[f"{side}_factor"], dtype=torch.float32)
            for side in ("short", "long")
        }
        return Rotation(RopeScalingType.LONGROPE, 1.0, window, temperature, lists)
    plain_F, _ = frequencies(config, {"rope_type": "default"} | unscaled(rope))
    return Rotation(None, 1.0, window, temperature, {"rope_freqs.weight": (plain_F / own_F).float()})


def usual_yarn(rope: dict[str, Any]) -> bool:
    """Whether yarn's ramp is the one that llama.cpp computes."""
    ramp = (rope.get("beta_slow") or YARN_SLOW, rope.get("beta_fast") or YARN_FAST)
    return ramp == (YARN_SLOW, YARN_FAST) and rope.get("truncate", True) and rope["factor"] >= 1


def describe(writer: Writer, config: LlamaConfig, *, name: str, dtype: Dtype) -> None:
    """The metadata of the model."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(KINDS[dtype][2])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(reach(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    turned = rotation(config)
    writer.add_rope_freq_base(rotary(config)["rope_theta"])
    if turned.scaling:
        writer.add_rope_scaling_type(turned.scaling)
        writer.add_rope_scaling_factor(turned.factor)
        writer.add_rope_scaling_orig_ctx_len(turned.window)
        writer.add_rope_scaling_finetuned(True)
    if not math.isclose(turned.temperature, 1.0, rel_tol=1e-9):
        writer.add_rope_scaling_attn_factors(turned.temperature)


def shapes_must_fit(folder: Path, config: LlamaConfig) -> dict[str, Path]:
    """The file of each tensor, in the model's order; exactly those that the configuration asks for.

    Raises:
        ValueError: tensors are missing, too many, or of another shape.
    """
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, Path] = {}
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                files[name], found[name] = file, tensors.get_slice(name).get_shape()
    if config.tie_word_embeddings:
        for known in (wanted, found):
            known.pop("lm_head.weight", None)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors are not what config.json asks for, first {wrong[0]}: "
            f"{found.get(wrong[0], 'not there')}, must be {wanted.get(wrong[0], 'absent')}"
        )
    return {name: files[name] for name in wanted}


def write_tensors(writer: Writer, config: LlamaConfig, *, stored: dict[str, Path], dtype: Dtype) -> None:
    """The list of tensors, then one after the other, so that memory holds one.

    Raises:
        ValueError: one holds what `dtype` cannot.
    """
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    listed: dict[str, str] = {}
    for name in stored:
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert told, name
        listed[name] = told
    divisors = rotation(config).divisors
    for told, divisors_F in divisors.items():
        writer.add_tensor_info(told, divisors_F.shape, np.dtype(np.float32), divisors_F.nbytes)
    for name, told in listed.items():
        with safe_open(stored[name], framework="pt") as tensors:
            shape = tensors.get_slice(name).get_shape()
        kind, raw, _ = KINDS[dtype if len(shape) > 1 else "f32"]
        size = math.prod(shape) * kind.itemsize
        writer.add_tensor_info(told, shape, np.dtype(np.float32), size, raw_dtype=raw)  # the type is raw_dtype's
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for divisors_F in divisors.values():
        writer.write_tensor_data(divisors_F.numpy())
    for name, tensor in converted(config, stored=stored, dtype=dtype):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds what {dtype} cannot (too large, or NaN): choose f32 or bf16, or repair it")
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())


def converted(config: LlamaConfig, *, stored: dict[str, Path], dtype: Dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor as llama.cpp has it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, file in stored.items():
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        part = name.split(".")[-2]
        if part in heads:
            tensor = neighbours(tensor, heads=heads[part])
        yield name, tensor.to(KINDS[dtype if tensor.dim() > 1 else "f32"][0])


def neighbours(rows: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Rows (H D, N), or (H D) of a bias: what turned with the row D/2 below it turns with the next one."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
