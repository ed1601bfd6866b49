"""On one CUDA GPU: attention by every backend, and whole training steps of a model as large as Llama 2 7B, with random weights.

python -m benchmarks.gpu --out gpu.json  # some six minutes on an H100; written case by case
python -m benchmarks.gpu --out gpu.json --only step  # the others stay as they are in the file

The authors' way is their path with flash attention: roll half of the heads, fold the groups into the batch, attend, unfold, roll
back. Here PyTorch's own flash kernel attends in both, so that the difference is the method's. Of 16 bit numbers only bfloat16.

Letters: B batch; L tokens; H heads; K key/value heads; D head dimension; G group; N groups.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from benchmarks.attention import RATIO
from benchmarks.step import ADAPTER, CHUNK, SPARSE
from longlora.attention.groups import group_size
from longlora.attention.kernels import flash_version
from longlora.attention.shifted import disable, enable, shifted_sparse_attention
from longlora.model.adapter import attach, trained_parameters
from longlora.training.loss import chunk_loss
from longlora.training.tile import tile_mlp

DEVICE = "cuda"
LAYERS = {"Llama 2 7B": (32, 32, 128), "Llama 3 8B": (32, 8, 128)}
"""Query heads, key/value heads, head dimension."""
LONGEST = 204800
LENGTHS = (8192, 16384, 32768, 65536, 102400)
STEPS = {
    16384: ("s2", "full", "authors"),
    32768: ("s2", "full", "authors"),
    102400: ("s2", "full", "authors"),
    LONGEST: ("s2",),
}
TILE = 8192
"""Of the feed-forward, beyond 102,400 tokens, where the checkpoints lie in the host's memory too."""
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=LONGEST,
    tie_word_embeddings=False,
    use_cache=False,
)
Attend = Callable[..., torch.Tensor]


def full(q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor) -> torch.Tensor:
    shared = q_BHLD.shape[1] != k_BKLD.shape[1]
    out_BHLD = scaled_dot_product_attention(q_BHLD, k_BKLD, v_BKLD, is_causal=True, enable_gqa=shared)
    return out_BHLD.transpose(1, 2)


def s2(
    backend: Any,
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    ids_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    size = group_size(q_BHLD.shape[2], RATIO)
    return shifted_sparse_attention(q_BHLD, k_BKLD, v_BKLD, group_size=size, document_ids_BL=ids_BL, backend=backend)


def authors(q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor) -> torch.Tensor:
    """The moved heads' last group is the sequence's end and then its start, which sees it: that is the leak, and costs nothing."""
    batch, heads, length, dim = q_BHLD.shape
    group = group_size(length, RATIO)
    keys = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BKLD, v_BKLD))

    def folded(x_BHLD: torch.Tensor) -> torch.Tensor:
        still, moved = x_BHLD.chunk(2, dim=1)
        x_BHLD = torch.cat([still, moved.roll(-(group // 2), dims=2)], dim=1)
        return x_BHLD.transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)

    q_NHGD, k_NHGD, v_NHGD = (folded(x) for x in (q_BHLD, *keys))
    out_NHGD = scaled_dot_product_attention(q_NHGD, k_NHGD, v_NHGD, is_causal=True)
    still, moved = out_NHGD.transpose(1, 2).reshape(batch, length, heads, dim).chunk(2, dim=2)
    return torch.cat([still, moved.roll(group // 2, dims=1)], dim=2)


METHODS: dict[str, Attend] = {
    "full": full,
    "s2 varlen": partial(s2, "varlen"),
    "s2 sdpa": partial(s2, "sdpa"),
    "s2 flash": partial(s2, "flash"),
    "s2 flex": partial(s2, "flex"),
    "authors": authors,
}


@contextmanager
def peak(said: dict[str, Any], *, over: bool) -> Generator[None]:
    """Note the most memory that the device held, in GB; `over`: beyond what it held before."""
    cuda = DEVICE == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda and over else 0
    yield
    said["peak_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3) if cuda else None


def seconds(work: Callable[[], object]) -> float:
    """Of the device, by its own clock."""
    if DEVICE != "cuda":
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def attention_case(
    shape: str, length: int, names: list[str], *, packed: bool = False, turns: int = 7
) -> dict[str, Any]:
    """Forward and backward; the methods take turns, ratios are to full attention in the same turn, smallest and largest beside.

    `packed`: the sequence is documents of 500 to 4,000 tokens, which do not see each other; to full attention it is one.
    """
    heads, kv_heads, dim = LAYERS[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        x = torch.randn(1, length, count, dim, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    inputs = [drawn(heads), drawn(kv_heads), drawn(kv_heads)]
    grad_BLHD = drawn(heads).detach().transpose(1, 2)
    ids_BL = documents(length).to(DEVICE) if packed else None

    def once(name: str) -> None:
        more = [ids_BL] if name.startswith("s2") else []
        torch.autograd.grad(METHODS[name](*inputs, *more), inputs, grad_BLHD)

    said: dict[str, Any] = {name: {} for name in names}
    for name in names:
        once(name)  # compiles, and chooses kernels
        with peak(said[name], over=True):
            once(name)
    rounds = [{name: seconds(partial(once, name)) for name in names} for _ in range(turns)]
    for name in names:
        ratios = [r[name] / r["full"] for r in rounds if r["full"]] or [0.0]
        said[name] |= {
            "seconds": statistics.median(r[name] for r in rounds),
            "of_full": statistics.median(ratios),
            "interval": [min(ratios), max(ratios)],
        }
    return said


def documents(length: int) -> torch.Tensor:
    """Ids of packed documents, (1, L)."""
    sizes = torch.randint(500, 4001, (length // 500 + 1,), generator=torch.Generator().manual_seed(0))
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)[None, :length]


def adapted_llama(config: LlamaConfig) -> Any:
    """Random weights, LongLoRA's trainable parts, gradient checkpointing; all else as longlora/training/fit.py has it."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    attach(model, ADAPTER)
    chunk_loss(model, chunk=CHUNK)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def attending(model: LlamaForCausalLM, method: str) -> None:
    """Have the model attend as the method says."""
    if method == "s2":
        enable(model, SPARSE)
    elif method == "full":
        disable(model)
    else:
        AttentionInterface.register("by_authors", lambda module, q, k, v, mask, **others: (authors(q, k, v), None))
        AttentionMaskInterface.register("by_authors", lambda *arguments, **others: None)
        model.set_attn_implementation("by_authors")


def step_cases(config: LlamaConfig, lengths: dict[int, tuple[str, ...]]) -> Generator[tuple[str, dict[str, Any]]]:
    """Seconds of a training step (forward, loss, backward, AdamW; batch 1), the shorter of two, and the most memory in use."""
    model = adapted_llama(config)
    adam = torch.optim.AdamW(list(trained_parameters(model).values()), lr=2e-5)

    def step(length: int) -> None:
        tokens_BL = torch.randint(config.vocab_size, (1, length), device=DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
        loss.backward()
        adam.step()
        adam.zero_grad()

    for length, methods in lengths.items():
        if length == LONGEST:
            tile_mlp(model, tile=TILE)
            model.activation_checkpointing_enable({"use_reentrant": False}, offload=DEVICE == "cuda")
        for method in methods:
            attending(model, method)
            step(min(1024, length))
            said: dict[str, Any] = {}
            with peak(said, over=False):
                times = [seconds(partial(step, length)) for _ in range(2 if length < 65536 else 1)]
            said["seconds"] = min(times)
            said["tokens_per_second"] = round(length / min(times)) if min(times) else None
            yield f"step, {length} tokens, {method}", said


def attention_cases() -> Generator[tuple[str, dict[str, Any]]]:
    missing = {"s2 flex"} if flash_version() else {"s2 flex", "s2 flash"}
    ready = [name for name in METHODS if name not in missing]
    for length in LENGTHS:
        yield f"attention, Llama 2 7B, {length} tokens", attention_case("Llama 2 7B", length, ready)
    yield "attention, Llama 3 8B, 32768 tokens", attention_case("Llama 3 8B", 32768, ready)
    alone = [name for name in ready if name != "authors"]  # theirs knows no documents
    packed = attention_case("Llama 2 7B", 32768, alone, packed=True)
    yield "attention, Llama 2 7B, 32768 tokens in documents", packed
    # Last, and at one length: it is compiled anew for each.
    yield "attention, Llama 2 7B, 16384 tokens, flex", attention_case("Llama 2 7B", 16384, ["full", "s2 flex"])


CASES: dict[str, Callable[[], Generator[tuple[str, dict[str, Any]]]]] = {
    "attention": attention_cases,
    "step": partial(step_cases, LLAMA_2_7B, STEPS),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON that the results are written to")
    parser.add_argument("--only", choices=CASES, help="measure these; the others stay as they are in OUT")
    given = parser.parse_args()
    out: Path = given.out
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: needs a CUDA GPU, and PyTorch sees none; `python -m benchmarks` runs on a CPU")
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    results: dict[str, Any] = json.loads(out.read_text()) if given.only and out.exists() else {"cases": {}}
    if results.setdefault("machine", machine) != machine:
        sys.exit(f"benchmarks.gpu: {out} is of another machine ({results['machine']}); measure all, without --only")
    for kind in [given.only] if given.only else CASES:
        for name, said in CASES[kind]():
            results["cases"][name] = said
            print(name, json.dumps(said), flush=True)
            out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
