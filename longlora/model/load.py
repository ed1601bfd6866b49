"""A model opened as any user would open it: a plain folder, transformers' own class, ordinary full attention.

Evaluation never sees the sparse attention of training, and computes in the precision that params.yaml names, whatever the
machine: scores are kept and fetched, and a ratio of two precisions would be the rounding's.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longlora.model.cache import shareable, steady
from longlora.model.position import read_afresh
from longlora.model.prefill import unmask
from longlora.parallel.device import own_gpu
from longlora.parallel.sharding import world
from longlora.section import Section, first_line

T = TypeVar("T")
SMALL = 1024
"""The hidden size up to which a core computes best alone: cores that share so small a product wait for each other. Beyond it,
several batches at once win nothing and take memory."""
AHEAD = 8
"""Tokens whose logits are looked at, and as many after them that must not change them."""
FORESIGHT = 0.01
"""Of the largest logit, the change that is no more than rounding."""
LEARNED = ("wpe", "embed_positions", "position_embeddings")
"""What transformers calls a table of positions."""


class Precision(Section):
    dtype: Literal["float32", "bfloat16"]
    """What every measure computes in. bfloat16 takes half of the memory; it moved the perplexity of the demo's model by less than
    a thousandth."""


def open_model(folder: Path, precision: Precision | None = None) -> PreTrainedModel:
    """The model of `folder`, ready to be asked: on the GPU if there is one, shared out over all if there are several, in main
    memory what they have no room for; among several processes, on this one's own GPU. Without `precision` in what suits the
    machine: bfloat16 on a GPU, else float32.

    Raises:
        ValueError: there is no model at `folder`, it does not open, lacks a weight, or its tokens see those after them.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model at {folder} (no config.json there, seen from {Path.cwd()})")
    cuda = torch.cuda.is_available()
    suits = "bfloat16" if cuda else "float32"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, because loading info is asked for
            folder,
            local_files_only=True,
            dtype=getattr(torch, precision.dtype if precision else suits),
            attn_implementation="sdpa",
            device_map=gpus() if cuda else "cpu",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except Exception as error:  # transformers looks at little of what it reads before it computes with it
        raise ValueError(f"the model at {folder} does not open: {first_line(error)}") from error
    if lacking := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        # transformers would fill them in by chance
        raise ValueError(
            f"the model at {folder} lacks weights that its config.json asks for, or has them in other sizes: {len(lacking)}, "
            f"{lacking[0]} first"
        )
    if not cuda and shareable(model):
        unmask(model)
    read_afresh(model)
    # transformers fills in what the publisher asks for (penalties, beams, words never to be said) where a caller says nothing.
    own = model.generation_config or GenerationConfig()
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    if sees_ahead(model.eval().requires_grad_(False)):
        raise ValueError(
            f"the model at {folder} is no causal one: its tokens see those after them, answers too, so no score of "
            "it would mean anything; is_causal in its config.json must not be false"
        )
    return model


@torch.inference_mode()
def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether what a token says of its next one depends on those that follow. A config can switch that on."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens_BL = torch.arange(2 * AHEAD, device=model.device).repeat(2, 1)
    tokens_BL[1, AHEAD:] += AHEAD
    logits_BLV = model(input_ids=tokens_BL % vocabulary, use_cache=False).logits[:, :AHEAD].float()
    # NaN is no foresight: a model that is broken is measured, and the gate says so.
    return bool((logits_BLV[0] - logits_BLV[1]).abs().max() > FORESIGHT * logits_BLV.abs().max())


def gpus() -> str | dict[str, int]:
    """A device map, as transformers takes one: all GPUs, by equal shares; among several processes, the own one."""
    return "auto" if world() == 1 else own_gpu()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`.

    Raises:
        ValueError: there is none, or it does not open.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"no tokenizer at {folder} (no tokenizer_config.json there, seen from {Path.cwd()})")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no other
        raise ValueError(f"the tokenizer at {folder} does not open: {first_line(error)}") from error


def must_reach(model: PreTrainedModel, length: int) -> None:
    """Check that the model can read `length` tokens, and as it will be used. Rotary positions go on beyond the config's number, and
    a model may be asked for more than it says, to show how it breaks; learned ones end.

    Raises:
        ValueError: it has learned positions, and too few; or it is in training mode.
    """
    learned = [
        min(module.num_embeddings, model.config.get_text_config().max_position_embeddings)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in LEARNED
    ]
    if learned and length > min(learned):
        raise ValueError(
            f"{length} tokens are asked for, and this model has {min(learned)} positions, which are learned and end there: "
            f"lower the lengths to {min(learned)}"
        )
    if model.training:
        raise ValueError(
            "the model is in training mode, where it may drop out or attend sparsely: measure after model.eval(), and, if S2-Attn "
            "is on, inside `with disabled(model):`"
        )


def batch_tokens(model: PreTrainedModel) -> int:
    """Tokens to compute at once, at most: what stays in a CPU's cache, or keeps a GPU busy."""
    return 4096 if model.device.type == "cpu" else 32768


def spread(work: Callable[[T], None], batches: Iterable[T], *, model: PreTrainedModel) -> None:
    """Do `work`, without gradients, for each batch. On a CPU a small model's batches are dealt out to as many threads as torch has,
    and each computes alone. The numbers do not depend on it."""
    work, threads = torch.inference_mode()(work), torch.get_num_threads()
    together = model.device.type == "cpu" and model.config.get_text_config().hidden_size <= SMALL and steady(model)
    if not together or threads == 1:
        for batch in batches:
            work(batch)
        return
    torch.set_num_threads(1)  # threads that begin now inherit it
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, batches):
                pass
    finally:
        torch.set_num_threads(threads)
