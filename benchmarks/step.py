"""A whole training step (forward, loss, backward, AdamW) that differs in the attention alone: S2-Attn, full SDPA, roll and mask.

A Llama of 8 heads of 64 and one layer under LongLoRA's trainable parts; the loss is chunked in all three.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from benchmarks.attention import DIM, DTYPES, HEADS, RATIO, fits, roll_and_mask
from benchmarks.fresh import rise_mb
from benchmarks.turns import Cases, Sizes, take_turns
from longlora.attention.shifted import Attention, enable
from longlora.model.adapter import Adapter, attach, trained_parameters
from longlora.training.loss import chunk_loss

LAYERS, WORDS, CHUNK = 1, 4096, 1024
ADAPTER = Adapter(
    method="lora",
    quantized=None,
    rank=8,
    alpha=16.0,
    dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    trainable=["embeddings", "norms"],
)
SPARSE = Attention(pattern="s2", shift="boundaries", group_ratio=RATIO, full_attention_last=0.0, backend="auto")
METHODS = ("s2", "full", "roll_and_mask")


def authors(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
    """Roll and mask, behind the signature that transformers calls."""
    return roll_and_mask(query, key, value).transpose(1, 2), None


def small_llama(
    *, layers: int, hidden: int, heads: int, words: int, dtype: torch.dtype, length: int
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.to(dtype)  # pyright: ignore[reportArgumentType], for transformers' decorator of it has lost `self`
    return model.train()


def training(model: LlamaForCausalLM, *, length: int, half: bool = False) -> Callable[[int], None]:
    """A training step of `model`, adapted already, on its first `tokens` of a fixed sequence; `half`: in bfloat16."""
    tokens_BL = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    adam = torch.optim.AdamW(list(trained_parameters(model).values()), lr=2e-5)

    def step(tokens: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(input_ids=tokens_BL[:, :tokens], labels=tokens_BL[:, :tokens]).loss
        loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def prepared(method: str, length: int, dtype: str) -> Callable[[int], None]:
    model = small_llama(layers=LAYERS, hidden=HEADS * DIM, heads=HEADS, words=WORDS, dtype=DTYPES[dtype], length=length)
    attach(model, ADAPTER)
    chunk_loss(model, chunk=CHUNK)
    if method == "s2":
        enable(model, SPARSE)
    elif method == "roll_and_mask":
        AttentionInterface.register("roll_and_mask", authors)
        AttentionMaskInterface.register("roll_and_mask", lambda *arguments, **others: None)
        model.set_attn_implementation("roll_and_mask")
    return training(model, length=length, half=dtype == "bfloat16")


def alone(method: str, length: str, dtype: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For benchmarks.fresh."""
    step = prepared(method, int(length), dtype)
    return partial(step, 64), partial(step, int(length))


def measure(length: int, dtype: str, *, patience: float) -> dict[str, Any]:
    names = [n for n in METHODS if n != "roll_and_mask" or fits(length, DTYPES[dtype])]
    works = {name: partial(prepared(name, length, dtype), length) for name in names}
    for work in works.values():
        work.func(256)
    result = take_turns(works, ours="s2", patience=patience)
    del works
    gc.collect()
    for name, said in result.items() if dtype == "float32" else ():
        said["peak_mb"] = rise_mb("step", name, length, dtype)
    return {"length": length, "dtype": dtype, "methods": result}


def cases(sizes: Sizes) -> Cases:
    return {f"{d} {n}": partial(measure, n, d, patience=sizes.patience) for d, n in sizes.pairs()}
