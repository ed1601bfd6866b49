"""What is trained: low-rank adapters, and with them the input embeddings and every normalization layer.

LongLoRA calls this "LoRA+" (paper, section 3.3 and table 2): low rank alone does not reach long contexts, with trainable
embeddings and norms it does. Hayou et al. 2024 use the same name for a larger learning rate of the B matrices; that is
`fit.loraplus_lr_ratio`, and something else.

All that was trained goes into one adapter folder that stock peft loads; tied embeddings stay tied.
"""

import copy
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn
from transformers import PreTrainedModel

from longlora.model.quiet_peft import BaseTunerLayer, LoraConfig, PeftModel, get_peft_model
from longlora.section import Section, nearest


class Adapter(Section):
    method: Literal["lora", "full"]
    """full: every weight of the model is trained, and the other keys do nothing."""
    quantized: Literal["nf4"] | None
    """The frozen linear layers while training. nf4: in four bits, QLoRA (longlora/model/quantized.py); null: as `fit.dtype`."""
    rank: int = Field(gt=0)
    """Rows of A and columns of B, the low-rank matrices of each adapted layer."""
    alpha: float = Field(gt=0)
    """The update is B A x alpha / rank."""
    dropout: float = Field(ge=0, lt=1)
    """Share of an adapter's inputs that are set to 0 while training."""
    target_modules: list[str] = Field(min_length=1)
    """Names of the linear layers that get an adapter, as the model calls them (GPT-NeoX: query_key_value, dense)."""
    trainable: list[Literal["embeddings", "norms"]]
    """What is trained whole beside the low-rank matrices."""

    @field_validator("quantized")
    @classmethod
    def frozen_only(cls, quantized: str | None, info: ValidationInfo) -> str | None:
        if quantized and info.data.get("method") == "full":
            raise ValueError(
                "only frozen weights are quantised, and adapter.method = full freezes none; null, or method lora"
            )
        return quantized


def attach(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel | PeftModel:
    """`model` with the adapter's parameters trainable, in float32, and all others frozen.

    Raises:
        ValueError: the model has an adapter already, or two weights where its config ties them; a target is no linear layer of this
            model (those there are, are named).
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has an adapter already: open the base anew, or attach to what merge_and_unload() returns"
        )
    if apart := sorted({*model.get_expanded_tied_weights_keys(all_submodels=True)} - {*model.all_tied_weights_keys}):
        # peft, which goes by the config, would make one of them.
        raise ValueError(
            f"the model's config ties {apart[0]} to the embeddings, and it has two matrices: open it with "
            "tie_word_embeddings=False"
        )
    if adapter.method == "full":
        return model.float().requires_grad_(True)
    linears = sorted({name.rsplit(".")[-1] for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)})
    for target in adapter.target_modules:
        if target not in linears:
            raise ValueError(
                f"adapter.target_modules: {type(model).__name__} has no linear layer '{target}'{nearest(target, linears)}"
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft annotates int, and multiplies
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        modules_to_save=whole_modules(model, trainable=adapter.trainable) or None,
        ensure_weight_tying=model.config.tie_word_embeddings and "embeddings" in adapter.trainable,
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # AdamW steps of 1e-5 vanish in a bfloat16 weight.
            parameter.data = parameter.data.float()
    return adapted


def whole_modules(model: PreTrainedModel, *, trainable: list[Literal["embeddings", "norms"]]) -> list[str]:
    """Ends of the names of the modules that are trained whole; no other module's name ends so, for peft goes by that alone."""
    kinds = {
        "norms": lambda m: type(m).__name__.endswith(("Norm", "NormGated", "Norm1P")),
        "embeddings": lambda m: m is model.get_input_embeddings(),
    }
    modules = list(model.named_modules(remove_duplicate=False))
    wanted = [name for name, m in modules if any(kinds[kind](m) for kind in trainable)]
    others = [name for name, _ in modules if name not in wanted]
    return sorted({own_end(name, others=others) for name in wanted})


def own_end(name: str, *, others: list[str]) -> str:
    """The shortest end of a module's `name` in which none of the `others` ends: in most families the last word of it, but a norm of
    StableLM's is called 0, as its first layer is."""
    words = name.split(".")
    ends = (".".join(words[-count:]) for count in range(1, len(words)))
    return next((end for end in ends if not any(other.endswith(end) for other in others)), name)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(model: PreTrainedModel | PeftModel, folder: Path | str) -> None:
    """Write the adapter (or, trained in full, the model) with the extended model's config beside it.

    Raises:
        ValueError: a weight is not finite, or there are other adapters than the one that peft calls default; then nothing is
            written.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel) and [*model.peft_config] != ["default"]:
        # peft would write each other one to a folder of its own, where no merge looks.
        raise ValueError(
            f"the adapter to save is the one called default, and the model has {', '.join(model.peft_config)}: give "
            "get_peft_model no adapter_name, and merge or delete_adapter the others first"
        )
    bad = [name for name, p in trained_parameters(model).items() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"{len(bad)} trained tensors hold NaN or infinity, the first is {bad[0]}; nothing was saved")
    if isinstance(model, PeftModel):
        # Where the base lies is dvc.yaml's to say: an absolute path here would change the adapter's hash from place to place.
        recipe = model.peft_config["default"]
        recipe.base_model_name_or_path = None
        # peft holds the names in a set, whose order is another in every process, and so would be the adapter's hash.
        if isinstance(recipe.target_modules, set):  # no pattern, which is a text
            recipe.target_modules = sorted(recipe.target_modules)  # type: ignore[assignment]
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's template, to be filled in by hand; the card is written by the report
        config = copy.deepcopy(model.get_base_model().config)
        if hasattr(
            config, "quantization_config"
        ):  # of the training: the adapter goes onto the base as it is on the disk
            del config.quantization_config
        config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
