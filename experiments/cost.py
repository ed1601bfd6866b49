"""Tables 11 and 12, small: what training costs by length and method, counted in FLOPs and measured in time.

FLOPs of a forward pass are counted by PyTorch as the model runs, attention by the shapes of the kernel's calls (whole squares, as
in table 11), and stand beside the formula of longlora/planning/cost.py. Time: the methods take turns at each length, a ratio is of
two neighbours; the share of attention is what the profiler sees in the kernel, forward and backward.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from experiments.arm import settings_of
from longlora.attention.cpu import kernel
from longlora.attention.shifted import Attention, enable
from longlora.model.adapter import Adapter
from longlora.model.position import Position
from longlora.planning.cost import Flops, Shape, Workload, forward_flops
from longlora.planning.plan import shape_named
from longlora.section import read_params, section_of
from longlora.training.fit import build, causal_model
from longlora.training.loss import chunk_loss

LENGTHS = (512, 1024, 2048, 4096)
TURNS = 7
METHODS = {"full fine-tuning": ("full", "full"), "LoRA": ("lora", "full"), "LongLoRA": ("lora", "s2")}
"""What is trained, and the pattern of attention. LoRA as LongLoRA has it, with embeddings and norms."""
THEIR_LENGTHS = (8192, 16384, 32768, 65536)
HOURS = {
    "full fine-tuning": (7.4, 16.3, 39.8, None),
    "LoRA": (6.0, 14.0, 36.5, 92.5),
    "LongLoRA": (5.2, 11.3, 24.6, 52.4),
}
"""Table 12: Llama 2 7B, 1,000 steps on 8 A100, by `THEIR_LENGTHS`; None is out of memory."""


def whole_squares(q: list[int], k: list[int], *others: Any, **named: Any) -> int:
    """FLOPs of a kernel's call on shapes (N, heads, G, D): both products, not only the causal half."""
    count, heads, group, dim = q
    return 4 * count * heads * group * k[2] * dim


def counted(model: PreTrainedModel, length: int) -> Flops:
    """FLOPs of one forward pass over one sequence."""
    with FlopCounterMode(display=False, custom_mapping={kernel: whole_squares}) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    by_module = counter.get_flop_counts()

    def inside(name: str) -> int:
        return sum(sum(ops.values()) for module, ops in by_module.items() if module.rpartition(".")[2] == name)

    attention = by_module["Global"][kernel]
    return Flops(
        attention=attention, projections=inside("self_attn") - attention, ffn=inside("mlp"), other=inside("lm_head")
    )


def step(model: PreTrainedModel, tokens_BL: torch.Tensor) -> float:
    """Seconds of the processor for a forward and a backward pass; time of the clock would count other programs."""
    began = time.process_time()
    model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss.backward()
    seconds = time.process_time() - began
    model.zero_grad()
    return seconds


def attention_share(model: PreTrainedModel, tokens_BL: torch.Tensor) -> float:
    """Of a step's time, what the attention kernel takes: the median of some steps."""
    shares = []
    for _ in range(TURNS):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, tokens_BL)
        events = profiler.key_averages()
        inside = sum(event.self_cpu_time_total for event in events if "flash_attention_for_cpu" in event.key)
        shares.append(inside / sum(event.self_cpu_time_total for event in events))
    return median(shares)


def flops_table(base: Path, llama: Shape, attention: Attention) -> list[str]:
    shape = Shape.from_config(AutoConfig.from_pretrained(base, local_files_only=True).to_dict())
    lines = [
        "| tokens | FLOPs of a forward | of it attention | theirs, at tokens | of it attention "
        "| attention in S2-Attn | theirs | S2-Attn by formula, by count |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, their_length in zip(LENGTHS, THEIR_LENGTHS, strict=True):
        ours, formulas, theirs = [], [], []
        for pattern in ("full", "s2"):
            model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True).train()
            enable(model, attention.model_copy(update={"pattern": pattern}))
            ours.append(counted(model, length))
            formulas.append(forward_flops(shape, workload=workload(length, pattern, attention)))
            theirs.append(forward_flops(llama, workload=workload(their_length, pattern, attention)))
        if ours[0] != formulas[0]:
            raise ValueError(f"full attention at {length} tokens: {ours[0]} counted, {formulas[0]} by formula")
        full, s2, their_full, their_s2 = (f"{100 * each.attention / each.total:.0f} %" for each in (*ours, *theirs))
        lines.append(
            f"| {length:,} | {ours[0].total:.3g} | {full} | {their_length:,} | {their_full} "
            f"| {s2} | {their_s2} | {formulas[1].attention / ours[1].attention:.3f} |"
        )
    return lines


def workload(length: int, pattern: str, attention: Attention) -> Workload:
    return Workload.model_construct(context=length, pattern=pattern, group_ratio=attention.group_ratio)


def time_table(base: Path, adapter: Adapter, attention: Attention) -> list[str]:
    lines = [
        "| tokens | | time of a step, by LoRA's | attention's share of it | theirs, at tokens | hours by LoRA's |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for place, length in enumerate(LENGTHS):
        tokens_BL = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1))
        position = Position(method="ntk" if length > LENGTHS[0] else "none", context=length)
        models = {}
        for name, (method, pattern) in METHODS.items():
            model = build(
                base, position=position, adapter=adapter.model_copy(update={"method": method}), dtype="float32"
            )
            chunk_loss(causal_model(model), chunk=1024)
            enable(causal_model(model), attention.model_copy(update={"pattern": pattern}))
            step(model.train(), tokens_BL)
            models[name] = model
        turns = [{name: step(model, tokens_BL) for name, model in models.items()} for _ in range(TURNS)]
        for name, model in models.items():
            ratios = [turn[name] / turn["LoRA"] for turn in turns]
            hours, theirs = HOURS[name][place], HOURS["LoRA"][place]
            ratio = f"{hours / theirs:.2f}" if hours and theirs else "out of memory"
            lines.append(
                f"| {length:,} | {name} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {100 * attention_share(model, tokens_BL):.0f} % | {THEIR_LENGTHS[place]:,} "
                f"| {ratio} |"
            )
    return lines


def main(base: Path, shapes: Path, out: Path) -> None:
    settings = settings_of(Path.cwd(), "paper")
    adapter, attention = section_of(Adapter, settings, "adapter"), section_of(Attention, settings, "attention")
    llama = shape_named("meta-llama/Llama-2-7b-hf", configs=read_params(shapes))
    lines = [
        "# Tables 11 and 12, small",
        "",
        "The demo's base on a CPU, beside Llama 2 7B, whose sequences are sixteen times as long. Shares are compared, not sizes.",
        "",
        "## Table 11: arithmetic",
        "",
        *flops_table(base, llama, attention),
        "",
        "Ours counted by PyTorch as the model ran; in full attention each part is what the formula says, to the last FLOP. The",
        "formula gives S2-Attn four whole groups; half of the heads have three and two halves, in all a sixteenth less. Theirs by",
        "the paper's formula, which tests hold to each cell of its table.",
        "",
        "## Table 12: time",
        "",
        *time_table(base, adapter, attention),
        "",
        f"Processor time of one sequence, forward and backward, on one core; median of {TURNS} turns, smallest and largest in",
        "brackets. [Memory](../docs/bench.md).",
        "",
        "Made by `make experiments`.",
    ]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
