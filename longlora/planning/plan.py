"""What a run will take, before any money is spent: FLOPs, hours, memory per GPU, the price, and whether it fits.

If it does not fit, the cheapest change that makes it fit is named: each rung of a ladder is tried alone, the one with the
fewest hours wins, only then are rungs combined, and only then are frozen weights put into four bits. Nothing is loaded but
numbers, so the answer takes milliseconds. Held to LongLoRA's Tables 11 and 12 (arXiv 2309.12307); `hardware` says which four
constants are fitted, and on which cells.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from longlora.planning.cost import Flops, Shape, Workload, check, forward_flops, trained_parameters
from longlora.planning.hardware import GPUS, Hardware, Memory, check_layout, loaded_gb, memory, misfits, step_seconds
from longlora.section import Frozen, nearest

KEYS = {
    "context": "position.context",
    "steps": "fit.steps",
    "global_batch_size": "fit.global_batch_size",
    "micro_batch_size": "fit.micro_batch_size",
    "pattern": "attention.pattern",
    "group_ratio": "attention.group_ratio",
    "shift": "attention.shift",
    "scaling": "position.method",
    "full_attention_last": "attention.full_attention_last",
    "backend": "attention.backend",
    "method": "adapter.method",
    "quantized": "adapter.quantized",
    "rank": "adapter.rank",
    "target_modules": "adapter.target_modules",
    "trainable": "adapter.trainable",
    "gradient_checkpointing": "fit.gradient_checkpointing",
    "loss_chunk": "fit.loss_chunk",
    "mlp_tile": "fit.mlp_tile",
    "dtype": "fit.dtype",
}
"""Where params.yaml says what a Workload's field holds."""

CHOICES = {
    "backend": ("auto", "sdpa", "flash", "varlen", "flex"),
    "scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"),
}
"""What a run takes for those fields of a Workload that hold any word."""

CHUNK = 1024
"""Tokens of a loss chunk, where the ladder proposes one."""

TILE = 4096
"""Tokens of a feed-forward's tile, where the ladder proposes one."""

CLOSE = 0.15
"""The memory estimate's error on Table 12 stays below this share."""


class Remedy(Frozen):
    """What makes a run fit, and how it is then."""

    changes: tuple[str, ...]
    gb_per_gpu: float
    hours: float


class Estimate(Frozen):
    """The plan of one run. GB are 2^30 bytes, per GPU and at the step's highest point."""

    hardware: Hardware
    workload: Workload
    parameters: int
    trained_parameters: int
    flops_forward: Flops
    """Of one sequence under the recipe's pattern, attention over the whole square as in Table 11."""
    seconds_per_step: float
    hours: float
    tokens_per_second: float
    """Over all GPUs."""
    gb_per_gpu: float
    gb_at_start: float
    """Before the first step, where ZeRO-3 starts from a model that each GPU holds whole; else 0."""
    gb_parts: Memory
    gb_on_host: float
    """Laid off to the host's memory by all GPUs together."""
    cost: float | None
    """In the currency of the price; None without one."""
    fits: bool
    close: bool
    """So near to the limit that the estimate's own error may turn the verdict."""
    remedy: Remedy | None
    """None where the run fits, or where nothing on this hardware makes it fit."""
    notes: tuple[str, ...]


class Change(NamedTuple):
    """A rung: what it is called, and the fields it sets."""

    words: str
    workload: dict[str, Any]
    hardware: dict[str, Any]


def shape_named(name: str, *, configs: Mapping[str, Mapping[str, Any]]) -> Shape:
    """The shape of a hub model among the `configs` of recipes/shapes.yaml.

    Raises:
        ValueError: the name is not among them; the nearest is named.
    """
    if name not in configs:
        raise ValueError(f"no sizes known of '{name}'{nearest(name, list(configs))}")
    return Shape.from_config(configs[name])


def workload_from_params(params: Mapping[str, Any]) -> Workload:
    """The workload of a recipe, given as the sections of params.yaml.

    Raises:
        ValueError: a key is missing, or its value is outside its range; all of them in one line.
    """
    places = {field: place.split(".") for field, place in KEYS.items()}
    missing = [f"{s}.{key}" for s, key in places.values() if key not in (params.get(s) or {})]
    if missing:
        raise ValueError("params: missing " + ", ".join(f"'{place}'" for place in missing))
    try:
        workload = Workload.model_validate({field: params[s][key] for field, (s, key) in places.items()})
    except ValidationError as error:
        said = [f"{KEYS[str(e['loc'][0])]} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ValueError("params: " + "; ".join(said)) from None
    for field, known in CHOICES.items():
        if (said := getattr(workload, field)) not in known:
            raise ValueError(f"params: there is no {KEYS[field]} '{said}'{nearest(said, [*known])}")
    return workload


def estimate_params(shape: Shape, params: Mapping[str, Any], hardware: Hardware) -> Estimate:
    """Plan a recipe, given as the sections of params.yaml; on a CPU, activations are in the host's memory whatever it says.

    Raises:
        ValueError: as `workload_from_params` and `estimate` do.
    """
    workload, offload = workload_from_params(params), params["fit"].get("activation_offloading")
    if not isinstance(offload, bool):
        raise ValueError(f"params: fit.activation_offloading = {offload!r} is neither true nor false")
    offloaded = {"offload_checkpoints": offload and not hardware.on_cpu}
    return estimate(shape, workload, hardware.model_copy(update=offloaded))


def estimate(shape: Shape, workload: Workload, hardware: Hardware) -> Estimate:
    """Plan a run.

    Raises:
        ValueError: the recipe does not fit together, or not to the architecture, or not to the layout of the hardware.
    """
    check(shape, workload=workload)
    check_layout(shape, workload=workload, hardware=hardware)
    parts, on_host = memory(shape, workload=workload, hardware=hardware)
    seconds = step_seconds(shape, workload=workload, hardware=hardware)
    hours = seconds * workload.steps / 3600
    whole = loaded_gb(shape, workload=workload, hardware=hardware)
    needed = max(parts.total, whole)
    fits = needed <= hardware.memory_gb
    remedy = None if fits else cheapest(shape, workload, hardware)
    return Estimate(
        hardware=hardware,
        workload=workload,
        parameters=shape.parameters,
        trained_parameters=trained_parameters(shape, workload=workload),
        flops_forward=forward_flops(shape, workload=workload),
        seconds_per_step=seconds,
        hours=hours,
        tokens_per_second=workload.global_batch_size * workload.context / seconds,
        gb_per_gpu=parts.total,
        gb_at_start=whole,
        gb_parts=parts,
        gb_on_host=on_host,
        cost=None if hardware.price is None else hours * hardware.gpus * hardware.price,
        fits=fits,
        close=is_close(needed, hardware),
        remedy=remedy,
        notes=tuple(reservations(workload, hardware, gb=needed, whole=whole)),
    )


def is_close(gb: float, hardware: Hardware) -> bool:
    """Whether the estimate's own error may decide if `gb` fit."""
    return abs(gb / hardware.memory_gb - 1) < CLOSE


def reservations(workload: Workload, hardware: Hardware, *, gb: float, whole: float) -> list[str]:
    """What the reader must know before trusting the numbers."""
    notes = []
    if is_close(gb, hardware):
        notes.append(f"within {CLOSE:.0%} of the GPU's memory: the estimate's own error may decide")
    if whole > hardware.memory_gb:
        notes.append(f"ZeRO-3 starts from a model that each GPU holds whole, {whole:.1f} GB, however many there are")
    if hardware.zero and workload.method == "full" and not hardware.half_weights:
        notes.append(
            "trained weights are float32 here, under ZeRO too; the paper's program kept them in 16 bit (half weights)"
        )
    if hardware.gpu not in GPUS:
        notes.append(
            f"utilisation {hardware.utilisation:.0%}: the default was fitted on A100s and is a guess elsewhere"
        )
    elif hardware.gpus > 1 and not hardware.gpu.startswith("A100"):
        notes.append(f"utilisation {hardware.utilisation:.0%}: it was fitted on one {hardware.gpu} alone")
    if not workload.fused:
        notes.append("eager attention is bound by memory traffic: the hours are a lower bound")
    if hardware.zero == 3 or hardware.sequence_parallel > 1:
        notes.append("communication is taken as hidden behind arithmetic: the hours are a lower bound")
    return notes


def ladder(shape: Shape, workload: Workload, hardware: Hardware) -> list[Change]:
    """Changes that save memory and leave the result as it is, the gentler first among equals in hours; each is one that
    `longlora run` can be told (so not ZeRO stage 1)."""
    rungs = []
    if workload.micro_batch_size > 1:
        rungs.append(Change("fit.micro_batch_size=1", {"micro_batch_size": 1}, {}))
    if not workload.gradient_checkpointing:
        rungs.append(Change("fit.gradient_checkpointing=true", {"gradient_checkpointing": True}, {}))
    if hardware.gpus > 1:
        stages = (2,) if workload.quantized else (2, 3)
        rungs += [Change(f"ZeRO stage {stage}", {}, {"zero": stage}) for stage in stages if stage > hardware.zero]
    if workload.loss_chunk is None or workload.loss_chunk > CHUNK:
        rungs.append(Change(f"fit.loss_chunk={CHUNK}", {"loss_chunk": CHUNK}, {}))
    if min(workload.mlp_tile or workload.context, workload.context) > TILE:
        rungs.append(Change(f"fit.mlp_tile={TILE}", {"mlp_tile": TILE}, {}))
    for degree in range(hardware.sequence_parallel + 1, hardware.gpus + 1):
        whole = hardware.gpus % degree == 0 and workload.context % degree == 0
        if whole and not any(misfits(shape, workload=workload, degree=degree)):
            rungs.append(Change(f"sequence-parallel degree {degree}", {}, {"sequence_parallel": degree}))
    if hardware.on_cpu:
        return rungs
    if not hardware.offload_optimizer:
        stage = max(hardware.zero, 2)
        rungs.append(
            Change(f"optimiser on the host (ZeRO stage {stage})", {}, {"offload_optimizer": True, "zero": stage})
        )
    if not hardware.offload_checkpoints:
        # without checkpoints there is nothing to lay off, so who is to set one is told to set both
        needed = "" if workload.gradient_checkpointing else "fit.gradient_checkpointing=true + "
        words = f"{needed}fit.activation_offloading=true"
        rungs.append(Change(words, {"gradient_checkpointing": True}, {"offload_checkpoints": True}))
    return rungs


def changed(workload: Workload, hardware: Hardware, changes: list[Change]) -> tuple[Workload, Hardware]:
    """Recipe and layout after the changes; of two ZeRO stages, or two degrees, the higher counts."""
    for change in changes:
        workload = workload.model_copy(update=change.workload)
        hardware = hardware.model_copy(
            update={k: max(v, hardware.zero) if k == "zero" else v for k, v in change.hardware.items()}
        )
    return workload, hardware


def cheapest(shape: Shape, workload: Workload, hardware: Hardware) -> Remedy | None:
    """The change with the fewest hours that fits; else the fewest rungs, from the bottom of the ladder, that fit together; else
    four bits, which change a little what is learnt, and what it takes beside them."""
    if (found := climbed(shape, workload, hardware)) or workload.method == "full" or workload.quantized:
        return found
    words, layout = ("adapter.quantized=nf4",), hardware
    if hardware.zero == 3:
        words, layout = (*words, "ZeRO stage 2"), hardware.model_copy(update={"zero": 2})
    return climbed(shape, workload.model_copy(update={"quantized": "nf4"}), layout, said=words)


def climbed(shape: Shape, workload: Workload, hardware: Hardware, *, said: tuple[str, ...] = ()) -> Remedy | None:
    """By the rungs of the ladder alone; `said`: what was changed already, which may be enough."""

    def tried(changes: list[Change]) -> Remedy:
        new_workload, new_hardware = changed(workload, hardware, changes)
        seconds = step_seconds(shape, workload=new_workload, hardware=new_hardware)
        parts, _ = memory(shape, workload=new_workload, hardware=new_hardware)
        words = (*said, *(change.words for change in changes))
        return Remedy(changes=words, gb_per_gpu=parts.total, hours=seconds * workload.steps / 3600)

    def fits(changes: list[Change]) -> bool:
        new_workload, new_hardware = changed(workload, hardware, changes)
        whole = loaded_gb(shape, workload=new_workload, hardware=new_hardware)
        return max(whole, tried(changes).gb_per_gpu) <= hardware.memory_gb

    if fits([]):
        return tried([])
    rungs = ladder(shape, workload, hardware)
    alone = [tried([rung]) for rung in rungs if fits([rung])]
    if alone:
        return min(alone, key=lambda remedy: remedy.hours)
    for height in range(2, len(rungs) + 1):
        taken = rungs[:height]
        if fits(taken):
            for rung in reversed(rungs[:height]):  # the harshest is given up first
                without = [other for other in taken if other is not rung]
                taken = without if fits(without) else taken
            return tried(taken)
    return None


def lines(plan: Estimate) -> list[str]:
    """The plan as text, one fact a line."""
    hardware, work, flops, parts = plan.hardware, plan.workload, plan.flops_forward, plan.gb_parts
    said = [f"{name} {figure(value / 1e12)}" for name, value in flops.model_dump().items()]
    held = [f"{name} {figure(value)}" for name, value in parts.model_dump().items() if name != "total"]
    pattern = "full attention" if work.pattern == "full" else f"s2 in groups of {work.group:,}"
    batch = f"{work.global_batch_size} sequences x {work.context:,} tokens"
    text = [
        f"run          {work.steps:,} steps x {batch}, {pattern}, {work.method}",
        f"trained      {plan.trained_parameters / 1e6:,.1f} of {plan.parameters / 1e6:,.1f} M parameters",
        f"hardware     {hardware.gpus} x {hardware.gpu}, ZeRO {hardware.zero}, sequence-parallel {hardware.sequence_parallel}",
        f"forward      {', '.join(said)} TFLOP, one sequence",
        f"time         {span(plan.hours)} at {hardware.utilisation:.0%} utilisation; {plan.tokens_per_second:,.0f} tokens/s",
        f"memory       {plan.gb_per_gpu:.1f} of {hardware.memory_gb:.1f} GB per GPU: {', '.join(held)}",
    ]
    if plan.gb_on_host:
        text.append(f"host memory  {plan.gb_on_host:.1f} GB over all GPUs")
    if plan.cost is not None:
        text.append(f"cost         {plan.cost:,.2f} at {hardware.price:g} per GPU and hour")
    text.append(f"verdict      {'fits' if plan.fits else 'does not fit'}")
    if plan.remedy:
        remedy = plan.remedy
        text.append(f"to fit       {' + '.join(remedy.changes)}: {remedy.gb_per_gpu:.1f} GB, {span(remedy.hours)}")
    elif plan.gb_at_start > hardware.memory_gb and work.method == "full":
        text.append("to fit       nothing short of larger GPUs, or a smaller model")
    elif not plan.fits:
        text.append("to fit       nothing short of more or larger GPUs, or a smaller model, context or adapter")
    return text + [f"note         {note}" for note in plan.notes]


def figure(value: float) -> str:
    """One decimal, and of what is less than that one digit: a small model's share is small, and not nothing."""
    return f"{value:,.1f}" if value >= 0.05 or not value else f"{value:.1g}"


def span(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 0.95 else f"{figure(hours * 60)} min"
