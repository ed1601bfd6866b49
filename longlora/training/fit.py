"""Fine-tuning: the transformers Trainer, with the few things that long contexts ask for.

The batch is said once, globally, and accumulation is derived from it. The loss is computed in chunks. A loss that is not
finite ends the run. Checkpoints are whole or absent, hold no pickle, and lie in a folder named by a digest of all that
determines the result: the same run resumes bit for bit, another run never finds them.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import distributed, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from longlora.attention.groups import group_size
from longlora.attention.shifted import Attention, disabled, enable, must_part_documents
from longlora.data.packing import training_blocks
from longlora.model.adapter import Adapter, attach, save, trained_parameters
from longlora.model.position import Position, extend, read_afresh, varies
from longlora.model.quantized import device_map, keep_for_training, nf4
from longlora.model.quiet_peft import PeftModel
from longlora.parallel.layout import accumulation, sharing_misfits
from longlora.parallel.ranks import Ranks, from_environment, must_agree
from longlora.parallel.sequence_parallel import SequenceShards, join, parallel_attention
from longlora.parallel.zero import Zero, meet_on_cpu, zero_from_environment
from longlora.section import Section, Seed, refuse, write_json
from longlora.training.checkpoint import checkpoint_folder, checkpoint_lock, checkpoint_step, digest, discard, latest
from longlora.training.energy import Meter
from longlora.training.history import History, write_cost
from longlora.training.loss import chunk_loss
from longlora.training.tile import tile_mlp
from longlora.training.trainer import FullAttentionAtEnd, LongTrainer, Stop, load_parameters

Beta = Annotated[float, Field(ge=0, lt=1)]


class Fit(Section):
    steps: int = Field(gt=0)
    """Optimiser steps."""
    global_batch_size: int = Field(gt=0)
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int = Field(gt=0)
    """Sequences per process that are in memory at once."""
    recall_share: float = Field(ge=0, le=1)
    """Share of the blocks that are recall exercises."""
    pairs_share: float = Field(ge=0, le=1)
    """Share of the blocks that are packed question-answer pairs, of which the answers alone are learnt."""
    neftune_noise_alpha: float | None = Field(gt=0)
    """NEFTune (Jain et al. 2024, arXiv 2310.05914): noise on the embeddings, 5 to 15; null is off."""
    learning_rate: float = Field(gt=0)
    """Peak AdamW learning rate, after the warm-up."""
    loraplus_lr_ratio: float = Field(gt=0)
    """Hayou et al. 2024: learning rate of the B matrices over that of A; 1 is off."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"]
    """After the warm-up the rate stays, or falls to 0 at the last step, on a line or half a cosine."""
    warmup_steps: int = Field(ge=0)
    """Steps in which the rate rises from 0, on a line."""
    betas: tuple[Beta, Beta]
    """AdamW's betas: decay, per step, of the running mean of gradients and of their squares."""
    weight_decay: float = Field(ge=0)
    """AdamW's, times the learning rate: the share of each trained weight that a step takes away."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are scaled down to this norm over all trained weights."""
    dtype: Literal["float32", "bfloat16"]
    """Of the frozen weights and the arithmetic; trained weights are kept in float32."""
    gradient_checkpointing: bool
    """Of a layer only the input is kept for the backward, the rest computed again: less memory, more time."""
    activation_offloading: bool
    """Under gradient checkpointing on a GPU: what is kept for the backward lies in the host's memory."""
    mlp_tile: int | None = Field(gt=0)
    """Tokens that a feed-forward takes at once, computed again for its gradients; null: all."""
    loss_chunk: int = Field(gt=0)
    """Tokens whose logits are in memory at once."""
    save_steps: int = Field(gt=0)
    """Steps between two checkpoints."""
    logging_steps: int = Field(gt=0)
    """Steps of a row of the training history, whose loss is their mean."""
    seed: Seed


def train(
    tokens: Path,
    *,
    pairs: Path | None = None,
    base: Path,
    adapter_folder: Path,
    history: Path,
    cost: Path,
    position: Position,
    attention: Attention,
    adapter: Adapter,
    settings: Fit,
) -> None:
    """Fine-tune `base` on the blocks of `tokens` and of `pairs`; write the adapter to `adapter_folder`, the training `history` and
    its `cost`.

    Raises:
        ValueError: settings that do not fit together, or a loss that is not finite.
        SystemExit: 143 after SIGTERM, with a checkpoint written.
    """
    ranks, zero = from_environment(), zero_from_environment()
    micro_batches = accumulation(
        settings.global_batch_size, micro_batch_size=settings.micro_batch_size, replicas=ranks.replicas
    )
    must_be_shareable(base, position=position, attention=attention, adapter=adapter, ranks=ranks, zero=zero)
    sections = (position, attention, adapter, settings)
    checkpoints = checkpoint_folder(digest([tokens, *([pairs] if pairs else []), base], sections=sections))
    blocks = training_blocks(
        tokens,
        pairs,
        length=position.context,
        samples=settings.steps * settings.global_batch_size,
        pairs_share=settings.pairs_share,
        recall_share=settings.recall_share,
        seed=settings.seed,
    )
    set_seed(settings.seed)
    model = build(base, position=position, adapter=adapter, dtype=settings.dtype)
    args = arguments(
        settings, checkpoints=checkpoints, accumulation=micro_batches, zero=zero, degree=ranks.degree
    )  # meets the other processes
    with checkpoint_lock(checkpoints, first=ranks.rank == 0, device=args.device):
        attend = attention_over(model, ranks)
        prepare(model, attend, attention=attention, settings=settings, ranks=ranks)
        trainer = LongTrainer(
            model=model,
            train_dataset=blocks if ranks.degree == 1 else SequenceShards(blocks, ranks, length=position.context),
            args=args,
            callbacks=[
                History(history, steps=settings.steps, tokens_per_step=settings.global_batch_size * position.context),
                FullAttentionAtEnd(attend, attention=attention, steps=settings.steps),
                stop := Stop(),
            ],
            ranks=ranks,
            adam=partial(optimizer, model, settings),
        )
        trainer.remove_callback(PrinterCallback)  # History prints
        meter = Meter()
        first = latest(checkpoints)
        done = checkpoint_step(first) if first else 0
        must_agree(done, where=checkpoints, device=args.device)
        trainer.train(resume_from_checkpoint=str(first) if first else None)
        if stop.agreed:
            barrier_and_destroy()
            raise SystemExit(143)
        trained = trainer.whole_parameters()  # of all processes, which must all ask
        if trainer.is_world_process_zero():
            if zero:  # DeepSpeed has taken this model to pieces
                unset_hf_deepspeed_config()
                model = build(base, position=position, adapter=adapter, dtype=settings.dtype)
                load_parameters(model, trained)
            write_adapter(model, adapter_folder, base=base, sections=sections)
            seen = (settings.steps - done) * settings.global_batch_size * position.context
            write_cost(cost, model=model, tokens=seen, meter=meter)
            discard(checkpoints)
        barrier_and_destroy()


def must_be_shareable(
    base: Path, *, position: Position, attention: Attention, adapter: Adapter, ranks: Ranks, zero: Zero | None
) -> None:
    """Raises ValueError: so many processes cannot hold such a sequence together, or ZeRO such weights."""
    base_config = AutoConfig.from_pretrained(base, local_files_only=True)
    config = base_config.get_text_config()
    extended = extend(base_config, method=position.method, context=position.context).get_text_config()
    refuse(
        sharing_misfits(
            position.context,
            pattern=attention.pattern,
            group_size=group_size(position.context, attention.group_ratio),
            shift=attention.shift,
            varying=position.method if varies(extended) else None,
            full_attention_last=attention.full_attention_last,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            degree=ranks.degree,
        )
    )
    if adapter.quantized and zero and zero.stage == 3:
        raise ValueError(
            "adapter.quantized: ZeRO-3 shares out the weights, which four bits do not allow here; LONGLORA_ZERO = 2"
        )


def prepare(
    model: PreTrainedModel | PeftModel,
    attend: Callable[[Attention], None],
    *,
    attention: Attention,
    settings: Fit,
    ranks: Ranks,
) -> None:
    """Have `model` attend, compute its loss and its feed-forward as the sections say."""
    attend(attention)
    with disabled(causal_model(model)):
        if settings.pairs_share or ranks.degree > 1:
            must_part_documents(causal_model(model))
        chunk_loss(causal_model(model), chunk=settings.loss_chunk)
    if settings.mlp_tile:
        tile_mlp(model, tile=settings.mlp_tile)


def write_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, *, base: Path, sections: tuple[Section, ...]
) -> None:
    """What was trained, the config that it is for, and `recipe.json`, the sections that it was trained by."""
    config = causal_model(model).config
    own = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
    config.use_cache = getattr(own, "use_cache", True)  # training went without
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(model, folder)
    write_json({type(s).__name__.lower(): s.model_dump() for s in sections}, folder / "recipe.json")


def attention_over(model: PreTrainedModel | PeftModel, ranks: Ranks) -> Callable[[Attention], None]:
    """What has `model` attend as a section says, alone or with the processes that hold the sequence together."""
    if ranks.degree == 1:
        return partial(enable, causal_model(model))
    together = partial(parallel_attention, together=join(ranks))
    return partial(enable, causal_model(model), attend=together, degree=ranks.degree)


def barrier_and_destroy() -> None:
    """Barrier, then destroy the process group; nothing in a lone process."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def build(base: Path, *, position: Position, adapter: Adapter, dtype: str) -> PreTrainedModel | PeftModel:
    """The base under the new position settings, with the trainable parts attached."""
    config = extend(
        AutoConfig.from_pretrained(base, local_files_only=True), method=position.method, context=position.context
    )
    quantized = (
        {"quantization_config": nf4(getattr(torch, dtype)), "device_map": device_map()} if adapter.quantized else {}
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, config=config, local_files_only=True, dtype=getattr(torch, dtype), **quantized
    )
    keep_for_training(model)
    read_afresh(model)
    model.config.use_cache = False
    if dtype == "bfloat16" and adapter.method == "lora":
        # The trained embedding is float32; without this the whole residual stream would be, at twice the memory.
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    return attach(model, adapter)


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def arguments(
    settings: Fit, *, checkpoints: Path, accumulation: int, zero: Zero | None, degree: int = 1
) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    if zero and on_cpu:
        meet_on_cpu()
    args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16" and zero is None,
        deepspeed=zero.config(dtype=settings.dtype) if zero else None,
        accelerator_config={"use_configured_state": zero is not None and on_cpu},
        use_cpu=on_cpu and zero is None,
        dataloader_pin_memory=not on_cpu,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={
            "use_reentrant": False,
            "offload": settings.activation_offloading and not on_cpu,
        },
        # The blocks hold the order already, so resuming is skipping.
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        # It is divided by the root of the tokens x hidden size that a process sees, and is meant by those of the whole sequence.
        neftune_noise_alpha=settings.neftune_noise_alpha and settings.neftune_noise_alpha / math.sqrt(degree),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # all that is trained is used
        report_to="none",
        seed=settings.seed,
    )
    # A process trains on one GPU. Without a launcher the Trainer would copy the model to all it sees (nn.DataParallel), and
    # multiply the loss by their number.
    args._n_gpu = min(args.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]  # n_gpu itself cannot be set
    return args


def optimizer(model: nn.Module, settings: Fit) -> torch.optim.AdamW:
    """AdamW over the trained parameters, the B matrices at their own rate (Hayou et al.)."""
    trained = trained_parameters(model)
    b_matrices = {name for name in trained if ".lora_B." in name}
    groups = [
        {"params": [p for name, p in trained.items() if name not in b_matrices], "lr": settings.learning_rate},
        {
            "params": [p for name, p in trained.items() if name in b_matrices],
            "lr": settings.learning_rate * settings.loraplus_lr_ratio,
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], betas=settings.betas, weight_decay=settings.weight_decay
    )
