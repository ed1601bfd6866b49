"""Whether a run's training fits into the memory of this machine, by the planner's numbers (longlora/planning)."""

import os

from flows.plan import shape_of
from flows.run_dir import RunDir
from longlora.parallel.layout import degree_of_sequences
from longlora.planning.cost import Shape, Workload
from longlora.planning.hardware import ALONE_GB, Hardware
from longlora.planning.plan import Estimate, estimate, estimate_params
from tasks.machine import gpu_memory_gb, host_memory_gb, launched
from tasks.overlay import sections_of

PROCESS_GB = 0.8
"""A process on a CPU before the model is there: PyTorch, transformers, the allocator's slack."""
ANY_TFLOPS = 100.0
"""Of the machine itself: only the order of changes by hours depends on it, and no hours are told."""


def must_fit(run_dir: RunDir, *, anyway: bool = False) -> None:
    """Refuse a run whose training, if it is still to be computed, cannot fit into the memory of this machine, unless it is to run
    `anyway`, or could not start there.

    Where the sizes of the model or the machine that computes are not known, that is said, and nothing is refused.

    Raises:
        ValueError: how much the training needs and the machine has, and the cheapest change that makes it fit; or a layout of the
            environment that the training would refuse.
    """
    if not any(stage.name == "fit" and stage.status == "stale" for stage in run_dir.stages):
        return
    params = sections_of((run_dir.folder / "params.yaml").read_text())
    try:
        hardware = this_machine()
        if anyway:
            return
        shape = shape_of(run_dir.folder, params["backbone"], fetched=run_dir.folder / "models" / "base" / "config.json")
    except LookupError as unknown:
        print(f"whether the training fits into memory was not checked: {unknown.args[0]}", flush=True)
        return
    found = estimate_params(shape, params, hardware)
    if not found.fits:
        raise ValueError(refusal(found, shape))
    if found.close:
        needed = max(found.gb_per_gpu, found.gb_at_start)
        print(f"the training may not fit: {needed:.1f} of {hardware.memory_gb:.1f} GB, estimated within 15 %")


def refusal(found: Estimate, shape: Shape) -> str:
    """One line: what is needed, what is there, what would help."""
    hardware, remedy = found.hardware, found.remedy
    what = f"each of {hardware.gpus} processes needs" if hardware.gpus > 1 else "training needs"
    said = f"{what} about {max(found.gb_per_gpu, found.gb_at_start):.1f} GB, and {hardware.gpu} has {hardware.memory_gb:.1f} GB"
    if remedy:
        wanted = f"with {' + '.join(remedy.changes)} it fits ({remedy.gb_per_gpu:.1f} GB)"
    elif shorter := shortened(shape, found.workload, hardware):
        changes = [f"position.context={shorter.workload.context}", *(shorter.remedy.changes if shorter.remedy else ())]
        wanted = f"nothing makes it fit at {found.workload.context:,} tokens, {' + '.join(changes)} would"
    else:
        wanted = "it takes more memory, or a smaller model"
    return f"the run does not fit: {said}; {wanted} (--anyway runs it all the same)"


def shortened(shape: Shape, workload: Workload, hardware: Hardware) -> Estimate | None:
    """At the largest context, by halving, that fits as it is or with other changes."""
    context = workload.context // 2
    while context >= 256:
        found = estimate(shape, workload.model_copy(update={"context": context}), hardware)
        if found.fits or found.remedy:
            return found
        context //= 2
    return None


def this_machine() -> Hardware:
    """The GPUs or CPU of this machine, laid out as the environment says (LONGLORA_LAUNCHER, LONGLORA_ZERO, ...).

    Raises:
        LookupError: the launcher computes elsewhere, or on an unknown number of processes.
        ValueError: a layout of the environment that the training would refuse, too.
    """
    zero, degree = int(chosen("LONGLORA_ZERO", "2", "3") or 0), degree_of_sequences()
    offload = chosen("LONGLORA_ZERO_OFFLOAD", "0", "1") == "1"
    gpus = gpu_memory_gb()
    processes = launched(os.environ.get("LONGLORA_LAUNCHER", ""), gpus=len(gpus))
    alone = processes == 1
    layout = {"tflops": ANY_TFLOPS, "gpus": processes, "zero": zero, "sequence_parallel": degree}
    if gpus:
        name, runtime = ("the GPU", ALONE_GB) if alone else ("each GPU", None)
        return Hardware.of(name, memory_gb=min(gpus), offload_optimizer=offload, runtime_gb=runtime, **layout)
    name = "this machine (no GPU)" if alone else "this machine (no GPU), shared out to them,"
    memory = host_memory_gb() / processes
    return Hardware.of(name, memory_gb=memory, on_cpu=True, runtime_gb=PROCESS_GB, **layout)


def chosen(variable: str, *choices: str) -> str:
    """What environment variable `variable` holds: one of `choices`, or ''.

    Raises:
        ValueError: it holds something else.
    """
    said = os.environ.get(variable, "")
    if said not in ("", *choices):
        raise ValueError(f"{variable}={said}: must be {', '.join(choices)} or unset")
    return said
