"""What a recipe would take on given hardware. The numbers are longlora.plan's; here they meet params.yaml."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from longlora.cost import Shape
from longlora.hardware import Hardware
from longlora.plan import estimate, lines, shape_named, workload_from_params
from tasks.overlay import merged, recipe_file
from tasks.workspace import Project


def plan(where: Project, *, recipe: str | None, overrides: list[str], hardware: Hardware) -> list[str]:
    """The plan as text, one fact a line.

    Raises:
        ValueError: a wrong recipe or key, a model whose sizes are not known, or a layout that can not be.
    """
    text = recipe_file(where.tree, recipe).read_text() if recipe else None
    params = merged((where.tree / "params.yaml").read_text(), recipe=text, overrides=overrides)
    sections: Any = OmegaConf.to_container(OmegaConf.create(params), resolve=True)
    return lines(estimate(shape_of(where, sections["backbone"]), workload_from_params(sections), hardware))


def shape_of(where: Project, backbone: dict[str, Any]) -> Shape:
    """From the model's own config.json if it is a local folder, else from recipes/shapes.yaml."""
    config = where.tree / Path(str(backbone["name"])) / "config.json"
    if backbone["source"] == "folder" and config.exists():
        return Shape.from_config(json.loads(config.read_text()))
    known: Any = OmegaConf.to_container(OmegaConf.load(where.tree / "recipes" / "shapes.yaml"))
    return shape_named(str(backbone["name"]), configs=known)
