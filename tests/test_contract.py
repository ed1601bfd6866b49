"""dvc.yaml must agree with the code it runs: same files, same sections, same paths."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from longlora.section import Section, read_params, section_of, sections_in

ROOT = Path(__file__).parent.parent
PIPELINE = OmegaConf.to_container(OmegaConf.create(re.sub(r"\\?\$\{", "<{", (ROOT / "dvc.yaml").read_text())))
STAGES = PIPELINE["stages"]


def reached(path: Path) -> set[str]:
    """Every longlora file that `path` imports, directly or not, itself included."""
    froms = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
    names = {name for n in froms for name in (n.module, *(f"{n.module}.{alias.name}" for alias in n.names))}
    files = [f for name in names if (f := ROOT.joinpath(*name.split(".")).with_suffix(".py")).exists()]
    return {str(path.relative_to(ROOT))}.union(*map(reached, files))


def entries(stage: dict, *keys: str) -> list[str]:
    """The plain names under `keys`, options dropped."""
    return [e if isinstance(e, str) else next(iter(e)) for k in keys for e in stage.get(k, [])]


def module_of(name: str) -> str:
    """The stage's file of longlora/stages: of its own name, except where several stages share one."""
    found = re.search(r"-m longlora\.stages\.(\w+) ", STAGES[name]["cmd"])
    assert found and (name == found[1] or name in (f"{found[1]}_retrained", f"{found[1]}_rivals"))
    return found[1]


def signature(name: str) -> dict[str, type]:
    function = importlib.import_module(f"longlora.stages.{module_of(name)}").stage
    return {n: p.annotation for n, p in inspect.signature(function, eval_str=True).parameters.items()}


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_the_files_the_stage_reaches(name):
    code = {d for d in entries(STAGES[name], "deps") if d.endswith(".py")}
    assert code == reached(ROOT / f"longlora/stages/{module_of(name)}.py")


@pytest.mark.parametrize("name", STAGES)
def test_params_are_the_sections_the_stage_takes(name):
    assert STAGES[name].get("params", []) == [n for n, kind in signature(name).items() if kind is not Path]


@pytest.mark.parametrize("name", STAGES)
def test_command_paths_are_the_data_deps_then_the_outs(name):
    paths = STAGES[name]["cmd"].split(f"longlora.stages.{module_of(name)} ")[1].split()
    data = [d for d in entries(STAGES[name], "deps") if not d.endswith(".py")]
    outs = entries(STAGES[name], "outs", "plots", "metrics")
    assert paths[: len(data)] == data
    assert sorted(paths[len(data) :]) == sorted(outs)
    assert len(paths) == [*signature(name).values()].count(Path)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_what_it_does(name):
    assert STAGES[name]["desc"].endswith(".")


SECTIONS = {n: kind for stage in STAGES for n, kind in signature(stage).items() if kind is not Path}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_params_yaml_holds_exactly_the_sections_that_stages_take():
    params = read_params(ROOT / "params.yaml")
    assert params.keys() == SECTIONS.keys()
    for name, kind in SECTIONS.items():
        assert issubclass(kind, Section)
        section_of(kind, params, name)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "shapes"], ids=lambda r: r.stem)
def test_every_recipe_is_valid_over_params_yaml(recipe):
    merged = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(recipe))
    params = OmegaConf.to_container(merged, resolve=True)
    for name, kind in SECTIONS.items():
        section_of(kind, params, name)
    assert params.keys() == SECTIONS.keys()


def sections_of_stages() -> list[type[Section]]:
    """Every section that a stage is given, and those inside them."""
    waiting = [*SECTIONS.values()]
    for kind in waiting:
        waiting += [k for f in kind.model_fields.values() for k in sections_in(f.annotation) if k not in waiting]
    return sorted(set(waiting), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", sections_of_stages(), ids=lambda kind: kind.__name__)
def test_every_key_says_what_it_means(kind):
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem not in ("shapes", "tiny-sft")], ids=lambda r: r.stem)
def test_a_recipe_of_a_real_model_says_its_share_of_full_attention(recipe):
    """The demo's is that of a model which must learn to retrieve in a hundred steps."""
    assert "full_attention_last" in read_params(recipe).get("attention", {})
