"""dvc.yaml must agree with the code it runs: same files, same sections, same paths."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from longlora.check import OWN, UNNAMED, check, sections_of
from longlora.report.gate import Gate
from longlora.section import Section, read_params, section_of, sections_in
from tasks.sources import hashed

ROOT = Path(__file__).parent.parent
PIPELINE = OmegaConf.to_container(OmegaConf.create(re.sub(r"\\?\$\{", "<{", (ROOT / "dvc.yaml").read_text())))
STAGES = PIPELINE["stages"]
SOURCES = OmegaConf.to_container(OmegaConf.load(ROOT / "sources.yaml"))


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
    assert found and (name == found[1] or name in [f"{found[1]}_{of}" for of in ("rescaled", "retrained", "rivals")])
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
    sections = [n for n, kind in signature(name).items() if kind is not Path]
    named = [section for section in sections if section in SOURCES]
    assert STAGES[name].get("params", []) == sections + ([{"sources.yaml": named}] if named else [])


def test_sources_yaml_says_what_lies_where_params_yaml_points():
    """Else a clean checkout is not its own snapshot, and `dvc repro` has another lock than a run."""
    text = (ROOT / "sources.yaml").read_text()
    assert hashed(text, (ROOT / "params.yaml").read_text(), ROOT) == text


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


def test_dvc_draws_the_perplexity_of_the_models_that_every_run_scores():
    (drawn,) = (plot["Perplexity by context length"] for plot in PIPELINE["plots"])
    assert (ROOT / f".dvc/plots/{drawn['template']}.json").is_file()
    (written,) = entries(STAGES["perplexity"], "outs")
    params = read_params(ROOT / "params.yaml")
    asked = {*params["evaluate"]["perplexity"], *params["rescale"]["methods"]}
    assert drawn["y"].keys() == {written.replace("<{item.model}", model) for model in asked}


SECTIONS = sections_of((ROOT / "dvc.yaml").read_text())
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_params_yaml_holds_exactly_the_sections_that_stages_and_matrices_take():
    params = read_params(ROOT / "params.yaml")
    assert params.keys() == SECTIONS.keys()
    for name, kind in SECTIONS.items():
        assert issubclass(kind, Section)
        section_of(kind, params, name)


def test_the_lists_of_models_are_read_by_matrices_alone_each_by_its_own_stage():
    assert not any({"evaluate", "rescale"} & {*entries(stage, "params")} for stage in STAGES.values())
    by_stage = {
        key: sorted(set(re.findall(r"evaluate\.(\w+)", str(stage.get("matrix"))))) for key, stage in STAGES.items()
    }
    assert {key: names for key, names in by_stage.items() if names} == {
        **{name: [name] for name in SECTIONS["evaluate"].model_fields},
        "longppl": ["keytokens", "longppl"],
    }


def test_the_models_that_every_run_makes_are_those_that_can_be_asked():
    assert {f"<{{models}}/{label}" for label in OWN} <= {
        out for stage in STAGES.values() for out in entries(stage, "outs")
    }


@pytest.mark.parametrize("measure", UNNAMED)
def test_models_beside_those_that_every_run_makes_are_asked_without_being_named(measure):
    of = {"rescaled": "rescale.methods", "retrained": "retrain.patterns", "rivals": "rivals.models"}
    found = {key: stage["matrix"] for key, stage in STAGES.items() if key.startswith(f"{measure}_")}
    assert found == {f"{measure}_{name}": {"model": f"<{{{models}}}"} for name, models in of.items()}


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "shapes"], ids=lambda r: r.stem)
def test_every_recipe_is_valid_over_params_yaml(recipe):
    merged = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(recipe))
    params = OmegaConf.to_container(merged, resolve=True)
    check(params, SECTIONS)
    assert params.keys() == SECTIONS.keys()
    if params["backbone"]["source"] == "hub":  # large: perplexity and passkeys alone let it through nowhere
        rules = Gate(**params["gate"]).more_rules
        asked = {path.split("/")[1] for rule in rules for path in rule.paths}
        assert asked == {"base", "yarn", "extended"} == set(params["evaluate"]["ruler"])
        assert {rule.metric for rule in rules} == {"ruler/extended/short", "ruler/extended/target"}
        # where untrained YaRN solves nothing either, to be no worse than it says nothing
        assert any(rule.metric == "ruler/extended/target" and rule.times == "ruler/base/window" for rule in rules)


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
