"""What the machine has and what training takes of it: memory per GPU by part, and seconds per optimiser step.

Four constants are fitted, by least squares of the relative error, on the first and the last column of LongLoRA's Table 12
(7B on 8 x A100-80GB, ZeRO-2; arXiv 2309.12307): five cells, at 8,192 and 65,536 tokens, whose hours give the first two
constants and whose GB the last two. The six cells at 16,384 and 32,768, and the one out of memory, are held out.
tests/test_plan.py repeats the fit and checks every cell. The ends bracket the range: fitted on any other two columns the hours
stay within 10 % too, but without the first column among them the GB at 8,192 come out 17 to 24 % high.

Communication between GPUs is taken as hidden behind arithmetic; traffic to the host's memory is not, and is added in full. GB
are 2^30 bytes throughout, as the GPUs' own tools count.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, computed_field

from longlora.parallel.layout import accumulation, sharing_misfits
from longlora.planning.activations import activations
from longlora.planning.cost import Shape, Workload, step_flops, trained_parameters
from longlora.section import Frozen, complaint, nearest, refuse

GB = 2**30

UTILISATION = 0.459
"""Share of an A100's peak that matrix products reach (fitted)."""
H100_UTILISATION, H200_UTILISATION = 0.362, 0.394
"""The same, each fitted to one training step of Llama 2 7B's size at 32,768 tokens: S2-Attn on an H100, full attention on an H200;
the five and two others that docs/gpus.md has are within 3 % then (tests/test_plan.py)."""
ATTENTION_SPEED = 1.504
"""Fused attention's rate over that of the products around it (fitted)."""
RUNTIME_GB = 8.39
"""CUDA context, NCCL, DeepSpeed's buckets and the allocator's slack, in a run of many processes (fitted)."""
BUCKET_SHARE = 0.728
"""Communication buffers and flat copies, over the size of what is trained (fitted, where that is in 16 bit)."""

ALONE_GB = 1.5
"""CUDA context and slack of a single process, an assumption: the paper has no such run."""
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a quantised weight, with its share of the scales and of their scales (QLoRA, section 3)."""
LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""


class Gpu(NamedTuple):
    """A maker's numbers: memory in GB that a program sees, dense TFLOP/s in 16 bit and float32, GB/s to the host; and ours."""

    memory_gb: float
    tflops: float
    float32_tflops: float
    host_gb_s: float
    utilisation: float = UTILISATION


VARYING = ("dynamic", "longrope")
"""Values of `position.method` under which a text's length decides how its tokens are turned."""

GPUS = {
    "A100-40GB": Gpu(39.4, 312, 19.5, 25),
    "A100-80GB": Gpu(79.1, 312, 19.5, 25),
    "H100-80GB": Gpu(79.1, 989, 67, 50, H100_UTILISATION),
    "H200": Gpu(139.7, 989, 67, 50, H200_UTILISATION),
}


class Hardware(Frozen):
    """GPUs and how the model is laid over them. `Hardware.of` fills in what a GPU's name says."""

    gpu: str
    memory_gb: float = Field(gt=0)
    tflops: float = Field(gt=0)
    """Peak in 16 bit."""
    float32_tflops: float = Field(gt=0)
    host_gb_s: float = Field(gt=0)
    """Between a GPU and the host's memory."""
    gpus: int = Field(default=1, gt=0)
    zero: int = Field(default=0, ge=0, le=3)
    """ZeRO stage: 1 partitions the optimiser, 2 the gradients too, 3 the parameters too."""
    sequence_parallel: int = Field(default=1, gt=0)
    """GPUs that share one sequence."""
    offload_optimizer: bool = False
    offload_checkpoints: bool = False
    price: float | None = Field(default=None, ge=0)
    """Of one GPU for one hour."""
    utilisation: float = Field(default=UTILISATION, gt=0, le=1)
    """Share of the peak that matrix products reach."""
    on_cpu: bool = False
    """Whether the memory is the host's own, so that nothing can be laid off to it."""
    half_weights: bool = False
    """Under ZeRO trained weights are kept in the run's number format, and in the base's place: the paper's program; ours keeps
    float32, beside the base."""
    runtime_gb: float | None = Field(default=None, ge=0)
    """What the process takes before the model is there; None for what the constants above say."""

    @classmethod
    def of(cls, gpu: str, *, memory_gb: float | None = None, tflops: float | None = None, **layout: Any) -> Self:
        """A GPU by name, or any device given its `memory_gb` and `tflops` (in the run's dtype); those given win over the name's.
        `layout`: the other fields.

        Raises:
            ValueError: an unknown name without both numbers, or a layout that contradicts itself.
        """
        known = GPUS.get(gpu)
        if known is None:
            if memory_gb is None or tflops is None:
                other = "" if memory_gb is None and tflops is None else " (or give memory_gb and tflops)"
                name = gpu.upper()
                sizes_of_it = [known for known in GPUS if known.startswith(name)]
                meant = (
                    f"; did you mean {' or '.join(map(repr, sizes_of_it))}?"
                    if sizes_of_it
                    else nearest(name, list(GPUS))
                )
                raise ValueError(f"unknown GPU '{gpu}'{meant}{other}")
            known = Gpu(memory_gb, tflops, tflops, host_gb_s=25)
        given = {"memory_gb": memory_gb, "tflops": tflops, "float32_tflops": tflops}
        sizes = {**known._asdict(), **{name: number for name, number in given.items() if number is not None}}
        try:
            hardware = cls(gpu=gpu, **sizes | layout)
        except ValidationError as error:
            raise ValueError("; ".join(complaint(cls, "hardware", e) for e in error.errors())) from None
        gpus, degree, zero = hardware.gpus, hardware.sequence_parallel, hardware.zero
        if gpus % degree:
            degrees = [d for d in range(1, gpus + 1) if gpus % d == 0]
            raise ValueError(f"sequence-parallel degree {degree} must divide the {gpus} GPUs: one of {degrees}")
        if hardware.offload_optimizer and zero < 1:
            raise ValueError("the optimiser is laid off to the host from ZeRO stage 1 on, and the stage is 0")
        return hardware

    @property
    def replicas(self) -> int:
        """GPUs, or groups of GPUs under sequence parallelism, that each take sequences of their own."""
        return self.gpus // self.sequence_parallel

    @property
    def alone(self) -> bool:
        """One process, without DeepSpeed."""
        return self.gpus == 1 and not self.zero


def check_layout(shape: Shape, *, workload: Workload, hardware: Hardware) -> None:
    """Raise ValueError where the recipe cannot be cut the way the hardware is laid out."""
    degree = hardware.sequence_parallel
    if workload.context % degree:
        raise ValueError(
            f"position.context = {workload.context} must be a multiple of the sequence-parallel degree {degree}; the nearest "
            f"is {max(1, round(workload.context / degree)) * degree}"
        )
    refuse(misfits(shape, workload=workload, degree=degree))
    if workload.quantized and hardware.zero == 3:
        raise ValueError(
            "adapter.quantized: ZeRO-3 shares out the weights, which four bits do not allow here; ZeRO stage 2"
        )
    accumulation(workload.global_batch_size, micro_batch_size=workload.micro_batch_size, replicas=hardware.replicas)


def misfits(shape: Shape, *, workload: Workload, degree: int) -> Iterator[str]:
    """Says so where `degree` GPUs cannot hold a sequence together, as the training itself would."""
    return sharing_misfits(
        workload.context,
        pattern=workload.pattern,
        group_size=workload.group,
        shift=workload.shift,
        varying=workload.scaling if workload.scaling in VARYING else None,
        full_attention_last=workload.full_attention_last,
        kv_heads=shape.kv_heads,
        degree=degree,
    )


class Memory(Frozen):
    """GB on each GPU at the highest point of a step, by part."""

    parameters: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    """And what the loss makes of them; 0 where a layer's backward is the higher point, for then they are gone."""
    buffers: float
    """Communication, gathered parameters, and what the process takes before the model is there."""

    @computed_field
    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimiser + self.activations + self.logits + self.buffers


def memory(shape: Shape, *, workload: Workload, hardware: Hardware) -> tuple[Memory, float]:
    """Memory per GPU, and GB that all GPUs together lay off to the host.

    A trained parameter is float32, its gradient too (4, 4), and Adam has its moments (8), under DeepSpeed beside a copy of the
    parameter (12). In the paper's program DeepSpeed keeps it in 16 bit beside a float32 master (2, 2, 12).
    """
    trained, own = trained_parameters(shape, workload=workload), trained_bytes(workload, hardware)
    parts = [hardware.gpus if hardware.zero >= stage else 1 for stage in (1, 2, 3)]
    optimiser = trained * (12 if hardware.zero else 8) / parts[0]
    gradients = trained * own / parts[1]
    parameters = weight_bytes(shape, workload=workload, hardware=hardware) / parts[2]
    tokens = workload.micro_batch_size * workload.context // hardware.sequence_parallel
    held = activations(shape, workload=workload, tokens=tokens, trained_bytes=own)
    kept, away = held.kept, 0.0
    if hardware.offload_checkpoints and workload.gradient_checkpointing:
        kept = min(kept, 2 * kept / shape.layers)  # the layer at work and the next
        away += held.kept - kept
    at_loss = held.head + held.logits >= held.layer
    buffers = buffer_bytes(shape, workload=workload, hardware=hardware)
    runtime = hardware.runtime_gb
    if runtime is None:
        runtime = ALONE_GB if hardware.alone else RUNTIME_GB
    if hardware.offload_optimizer:
        away, optimiser, gradients = away + optimiser + gradients, 0.0, 0.0
    highest = kept + (held.head if at_loss else held.layer)
    if hardware.alone and "embeddings" in workload.trainable:
        highest = max(highest, 4.0 * shape.embedding)  # whose fresh gradient comes last, when they are gone
    return Memory(
        parameters=parameters / GB,
        gradients=gradients / GB,
        optimiser=optimiser / GB,
        activations=highest / GB,
        logits=held.logits / GB if at_loss else 0.0,
        buffers=buffers / GB + runtime,
    ), away * hardware.gpus / GB


def trained_bytes(workload: Workload, hardware: Hardware) -> int:
    """Bytes of a trained weight, as it lies in the model."""
    return workload.number_bytes if hardware.zero and hardware.half_weights else 4


def weight_bytes(shape: Shape, *, workload: Workload, hardware: Hardware) -> float:
    """Bytes of all weights: those that are trained beside the whole base, as peft keeps the frozen original of an embedding or a
    norm, too (1.2 GB in Qwen3 8B). The paper's program trains them in the base's place."""
    trained, b = trained_parameters(shape, workload=workload), workload.number_bytes
    in_place = workload.method == "full" or (hardware.zero and hardware.half_weights)
    frozen = float(b * (shape.parameters - (trained if in_place else 0)))
    if workload.quantized:
        linears = shape.layers * sum(width * out for width, out in shape.linears.values())
        frozen -= linears * (b - NF4_BITS / 8)
    return trained_bytes(workload, hardware) * trained + frozen


def loaded_gb(shape: Shape, *, workload: Workload, hardware: Hardware) -> float:
    """GB on a GPU under ZeRO-3 before the first step: DeepSpeed takes a model to pieces that was loaded whole."""
    if hardware.zero < 3:
        return 0.0
    held = weight_bytes(shape, workload=workload, hardware=hardware)
    return held / GB + (ALONE_GB if hardware.runtime_gb is None else hardware.runtime_gb)


def buffer_bytes(shape: Shape, *, workload: Workload, hardware: Hardware) -> float:
    """Bytes on a GPU for communication, in a lone process for one fresh gradient; and for autocast's copies of trained weights."""
    trained, b = trained_parameters(shape, workload=workload), workload.number_bytes
    full, own = workload.method == "full", trained_bytes(workload, hardware)
    copies = float(b * trained if full and b < own else 0)
    if hardware.alone:
        largest = max(shape.embedding, shape.hidden * shape.intermediate) if full else shape.embedding
        head_trained = full or (shape.tied and "embeddings" in workload.trainable)  # while the rest is held
        fresh = 4.0 * largest if head_trained else 0.0
        whole = b * shape.hidden * shape.intermediate if workload.quantized else 0.0  # the layer at work, in full
        return fresh + copies + whole
    if hardware.zero < 3:
        return BUCKET_SHARE * own * trained + copies
    gathered = min(LIVE_PARAMETERS, shape.parameters - shape.parameters / hardware.gpus)
    return (own if full else b) * gathered + BUCKET_SHARE * own * trained / hardware.gpus + copies


def step_seconds(shape: Shape, *, workload: Workload, hardware: Hardware) -> float:
    """Seconds of one optimiser step, all GPUs at work on the global batch; the host's own Adam under offload is not counted."""
    products, attention = step_flops(shape, workload=workload)
    peak = 1e12 * (hardware.float32_tflops if workload.dtype == "float32" else hardware.tflops)
    rate = peak * hardware.utilisation
    attention_rate = min(rate * ATTENTION_SPEED, peak)
    arithmetic = workload.global_batch_size * (products / rate + attention / attention_rate) / hardware.gpus
    moved = 0.0
    if hardware.offload_optimizer:
        moved += 2 * workload.number_bytes * trained_parameters(shape, workload=workload) / hardware.gpus
    if hardware.offload_checkpoints and workload.gradient_checkpointing:
        tokens = workload.micro_batch_size * workload.context // hardware.sequence_parallel
        own = trained_bytes(workload, hardware)
        kept = activations(shape, workload=workload, tokens=tokens, trained_bytes=own).kept
        micro_steps = workload.global_batch_size / (workload.micro_batch_size * hardware.replicas)
        moved += 2 * kept * micro_steps
    return arithmetic + moved / (hardware.host_gb_s * 1e9)
