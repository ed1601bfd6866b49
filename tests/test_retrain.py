"""The retrained baseline is the recipe with another attention pattern, and nothing else of it changed."""

import json
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo
from omegaconf import OmegaConf
from specimens import ADAPTER, ATTENTION, FIT, POSITION
from training import run, weights

from longlora.stages.retrain import stage
from longlora.training.retrain import Retrain

ROOT = Path(__file__).parent.parent


def retrain(place, pattern: str, *, patterns: list[str], attention=ATTENTION) -> None:
    (place / "pairs").mkdir(exist_ok=True)
    paths = {"tokens": place / "tokens", "pairs": place / "pairs", "base": place / "base"}
    outs = {
        "adapter_folder": place / pattern,
        "history": place / f"{pattern}.csv",
        "cost": place / f"cost_{pattern}.json",
    }
    sections = {"position": POSITION, "attention": attention, "adapter": ADAPTER, "fit": FIT}
    stage(**paths, **outs, **sections, retrain=Retrain.model_validate({"patterns": patterns}))


def test_it_is_the_recipe_under_full_attention(place):
    retrain(place, "full", patterns=["full"])
    dense = run(place, "dense", attention=ATTENTION.model_copy(update={"pattern": "full"}))
    assert weights(place / "full") == weights(dense)
    assert (place / "full.csv").read_bytes() == (place / "dense.csv").read_bytes()
    assert weights(place / "full") != weights(run(place, "sparse"))
    recipes = [json.loads((place / name / "recipe.json").read_text()) for name in ("full", "sparse")]
    assert [recipe["attention"].pop("pattern") for recipe in recipes] == ["full", "s2"]
    assert recipes[0] == recipes[1]


def test_its_cost_has_a_name_of_its_own(place):
    retrain(place, "full", patterns=["full"])
    assert list(json.loads((place / "cost_full.json").read_text())) == ["cost_full"]


def test_the_recipes_own_pattern_is_no_comparison(place):
    with pytest.raises(
        ValueError, match=r"retrain.patterns names s2, which is attention.pattern already: name full, or none"
    ):
        retrain(place, "s2", patterns=["s2"])


def test_a_recipe_in_full_attention_can_be_compared_with_the_sparse_one(place):
    full = ATTENTION.model_copy(update={"pattern": "full"})
    retrain(place, "s2", patterns=["s2"], attention=full)
    assert weights(place / "s2") == weights(run(place, "sparse"))


def test_by_dvc_yaml_it_is_merged_and_scored_from_what_it_wrote(tmp_path):
    """`longlora run -s 'retrain.patterns=[full]'`: each stage of it reads what the one before writes, and none writes ours."""
    for name in ("dvc.yaml", "sources.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    params = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), {"retrain": {"patterns": ["full"]}})
    OmegaConf.save(params, tmp_path / "params.yaml")
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
        edges = {(one.name, other.name) for one, other in repo.index.graph.edges}
    outs = {name: {out.def_path for out in stage.outs} for name, stage in stages.items() if name.endswith("@full")}
    assert outs == {
        "retrain@full": {"models/adapters/full", "metrics/cost_full.json", "metrics/history_full.csv"},
        "merge_retrained@full": {"models/full"},
        "perplexity_retrained@full": {"metrics/scores/perplexity/full.json", "metrics/scores/perplexity/full.csv"},
        "passkey_retrained@full": {"metrics/scores/passkey/full.json"},
    }
    assert {pair for pair in edges if pair[0].endswith("@full")} == {
        *(("retrain@full", name) for name in ("backbone", "blocks", "pairs")),
        *(("merge_retrained@full", name) for name in ("backbone", "retrain@full")),
        *(("perplexity_retrained@full", name) for name in ("blocks", "merge_retrained@full")),
        ("passkey_retrained@full", "merge_retrained@full"),
    }
    for name in ("gate", "report"):  # they judge and tell whatever lies among the scores
        assert "metrics/scores" in {dep.def_path for dep in stages[name].deps}
