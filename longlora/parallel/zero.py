"""DeepSpeed ZeRO: optimiser state and gradients (2), or parameters too (3), shared out to the processes.

Rajbhandari et al. 2020. Where a run happens is no parameter, so the stage comes from the environment: LONGLORA_ZERO = 2 or 3,
LONGLORA_ZERO_OFFLOAD = 1 for the optimiser state in the host's memory. The configuration says no number that params.yaml says. As
without DeepSpeed, frozen weights keep their number format, trained ones are float32, and the arithmetic is under autocast, so the
training is the same; and checkpoints hold whole tensors by name, so that any stage and number of processes resumes from any other.
tests/test_zero.py holds all of this to one process without DeepSpeed.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import distributed, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Zero:
    stage: Literal[2, 3]
    offload: bool

    def config(self, *, dtype: str) -> dict[str, Any]:
        """For DeepSpeed; `auto` is filled in by the Trainer, from what it was told already."""
        shared = {"stage": self.stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
        if self.offload:
            shared["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.stage == 3:
            shared |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": shared,
            "zero_force_ds_cpu_optimizer": False,  # the Adam of params.yaml, on whatever device
            # Not `bf16`: that would round the trained weights. No module's gradients are sent in 16 bits.
            "torch_autocast": {"enabled": dtype == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }


def zero_from_environment() -> Zero | None:
    """Raises ValueError: no such stage, no DeepSpeed, or no launcher."""
    said, offload = os.environ.get("LONGLORA_ZERO", ""), os.environ.get("LONGLORA_ZERO_OFFLOAD", "")
    if said not in ("", "2", "3") or offload not in ("", "0", "1"):
        raise ValueError(
            f"LONGLORA_ZERO = '{said}' must be 2, 3 or unset, LONGLORA_ZERO_OFFLOAD = '{offload}' 0, 1 or unset"
        )
    if not said:
        if offload == "1":
            raise ValueError(
                "LONGLORA_ZERO_OFFLOAD = 1 lays the optimiser off under ZeRO alone: set LONGLORA_ZERO to 2 or 3"
            )
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"LONGLORA_ZERO = {said} needs DeepSpeed: pip install 'longlora-pipeline[deepspeed]'")
    if not {"RANK", "LOCAL_RANK"} <= os.environ.keys():  # it would ask MPI who we are
        raise ValueError(
            f'LONGLORA_ZERO = {said} needs a launcher, for one process too: LONGLORA_LAUNCHER="torchrun --nproc-per-node 1"'
        )
    return Zero(2 if said == "2" else 3, offload == "1")


def meet_on_cpu() -> None:
    """Join the other processes where there is no GPU: left to itself, accelerate knows DeepSpeed on a CPU as one process alone."""
    from deepspeed import ops  # pyright: ignore[reportMissingImports]

    # It would be compiled now, and then its processes wait for each other by spinning; gloo needs neither.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def whole(parameters: dict[str, nn.Parameter], *, keep: bool) -> dict[str, torch.Tensor]:
    """The whole parameters, in the host's memory. Collective: every rank calls; only ranks with keep=True get tensors."""
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    gathered = ((name, safe_get_full_fp32_param(p)) for name, p in parameters.items())
    return {name: on_host(value) for name, value in gathered if keep}


def whole_states(parameters: dict[str, nn.Parameter], *, engine: Any, keep: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Adam's whole state of each parameter. Collective, as `whole`."""
    from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

    link(engine)
    step = next(iter(engine.optimizer.optimizer.state.values()))["step"]
    gathered = (
        (name, kind, safe_get_full_optimizer_state(p, kind)) for name, p in parameters.items() for kind in MOMENTS
    )
    states = {name: {"step": on_host(step)} for name in parameters if keep}
    for name, kind, value in gathered:
        if keep:
            states[name][kind] = on_host(value)
    return states


def on_host(value: torch.Tensor | None) -> torch.Tensor:
    """A copy; None is how DeepSpeed says that it does not know the parameter."""
    assert value is not None
    return value.detach().cpu().clone()


def link(engine: Any) -> None:
    """Let DeepSpeed's stage 2 find Adam's state. By itself it looks after its first group has stepped, and misses the second's."""
    if not engine.zero_optimization_partition_weights():
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def load_states(states: dict[nn.Parameter, dict[str, torch.Tensor]], *, engine: Any) -> None:
    """Give Adam, which has not stepped yet, this process's part of `states`."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state  # pyright: ignore[reportMissingImports]

    optimizer, step = engine.optimizer, next(iter(states.values()))["step"]
    partitioned = engine.zero_optimization_partition_weights()
    flats = optimizer.fp32_partitioned_groups_flat if partitioned else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        optimizer.optimizer.state[flat] = {"step": step.clone(), **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
    link(engine)
    for parameter, state in states.items():
        for kind in MOMENTS:
            if partitioned:  # not its function for whole tensors, which stumbles where the parts are not equal
                part, rank = parameter.partition_numel(), distributed.get_rank()
                flat = nn.functional.pad(
                    state[kind].flatten(), (0, part * distributed.get_world_size() - state[kind].numel())
                )
                safe_set_local_optimizer_state(parameter, flat[part * rank : part * (rank + 1)], kind)
            else:
                safe_set_full_optimizer_state(parameter, state[kind], kind)
