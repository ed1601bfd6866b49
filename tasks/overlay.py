"""params.yaml under a recipe and overrides: the same keys, other values.

An overlay says only what differs. It may not add a key, so a typo ends in one line with the nearest right name instead of silently
leaving the default; whether a value is in its range is checked by the library (longlora/check.py).
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tasks.errors import one_line

SHAPES = "shapes.yaml"  # stands beside the recipes that name the models, and is none


def recipe_file(tree: Path, name: str) -> Path:
    """`recipes/NAME.yaml` of `tree`; only names that are there, so no name can leave the folder.

    Raises:
        ValueError: no such recipe; says the nearest one.
    """
    files = sorted(path for path in (tree / "recipes").glob("*.yaml") if path.is_file())
    known = {path.stem: path for path in files if path.name != SHAPES}
    if name not in known:
        # as a path, "recipes/big.yaml", the file's own name is what comes near
        raise ValueError(f"no recipe '{name}'{nearest(Path(name).stem, list(known))}")
    return known[name]


def read_text(path: Path) -> str:
    """The text of a YAML file; raises ValueError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} must be text in UTF-8: byte {error.start} is none") from None


def merged(params: str, *, recipe: str | None = None, overrides: list[str] | None = None) -> str:
    """The text of params.yaml with `recipe` (YAML text) and then `overrides` (`key.key=value`) laid over it.

    Values that change nothing give back the very same text, so that they do not make another run of it.

    Raises:
        ValueError: an overlay is no YAML, names an unknown key, or puts a value where a section or list is (or the reverse); the
            recipe is empty.
    """
    base = sections_of(params)
    layers = [parse(recipe, "the recipe")] if recipe is not None else []
    if layers and not plain(layers[0]):
        raise ValueError("the recipe is empty: it must say what differs from params.yaml")
    layers += [assignment(item) for item in overrides or []]
    for layer in layers:
        check(plain(layer), base, ())
    result = plain(OmegaConf.merge(OmegaConf.create(base), *layers))
    return params if result == base else OmegaConf.to_yaml(OmegaConf.create(result))


def appended(params: str, key: str, word: str) -> str:
    """The override by which list `key` (key.key) of the text `params` has `word` after what it has."""
    known: Any = sections_of(params)
    for part in key.split("."):
        known = known.get(part) if isinstance(known, dict) else None
    words = known if isinstance(known, list) else []  # what else stands there `merged` says
    whole = [*words, *({word} - set(map(str, words)))]
    return f"{key}={yaml.safe_dump(whole, default_flow_style=True, width=math.inf).strip()}"


def sections_of(params: str) -> dict[str, Any]:
    """The text of params.yaml as plain containers. OmegaConf reads `2e-5` as a number.

    Raises:
        ValueError: it is no YAML, or no sections.
    """
    return plain(parse(params, "params.yaml"))


def parse(text: str, source: str) -> Any:
    try:
        config = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{source} is not readable as YAML: {one_line(error)}") from None
    return values_only(config, source)


def values_only(config: Any, source: str) -> Any:
    """`config`, if it refers to nothing: an environment variable could be read into files that are kept and pushed."""
    for line in OmegaConf.to_yaml(config).splitlines():
        if "${" in line:
            raise ValueError(f"{source}: write the value itself, not a reference to one: {line.strip()}")
    return config


def assignment(item: str) -> Any:
    """One `key.key=value` as a config."""
    key, equals, _ = item.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {item!r}: must be key=value, such as fit.steps=200")
    try:
        config = OmegaConf.from_dotlist([item])
    except (YAMLError, OmegaConfBaseException):
        raise ValueError(f"--set {item!r}: the value is not readable as YAML") from None
    return values_only(config, f"--set {key}")


def plain(config: Any) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"params: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"params must be sections (name: {{key: value}}), not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def check(overlay: dict[str, Any], base: dict[str, Any], path: tuple[str, ...]) -> None:
    """Every key of `overlay` is one of `base`, with a value of the same shape."""
    for key, value in overlay.items():
        name = ".".join((*path, str(key)))
        if key not in base:
            raise ValueError(f"unknown key '{name}'{meant(str(key), base, path)}")
        old = base[key]
        if isinstance(old, dict) and isinstance(value, dict):
            check(value, old, (*path, str(key)))
        elif shape(old) != shape(value) and None not in (old, value):
            if isinstance(old, dict):  # written out it would fill the screen
                raise ValueError(
                    f"{name} = {value!r}: must be a section: name a key of it, such as {name}.{next(iter(old))}"
                )
            raise ValueError(f"{name} = {written(value)}: must be {shape(old)}, as in {name} = {written(old)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} = {value!r}: must be finite")


def meant(key: str, base: dict[str, Any], path: tuple[str, ...]) -> str:
    """What to say of a key that is not in `base`: the sections in it that have such a key, else the nearest."""
    whole = [".".join((*path, name, key)) for name, keys in base.items() if isinstance(keys, dict) and key in keys]
    return f"; did you mean {' or '.join(map(repr, whole))}?" if whole else nearest(key, [str(k) for k in base])


def shape(value: Any) -> str:
    """What can be said about a value's type without knowing its section."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else "text"


def written(value: Any) -> str:
    """As YAML has it: true, not True."""
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known) or 'none'}"
