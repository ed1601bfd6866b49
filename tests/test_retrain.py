"""The retrained baseline is the recipe with another attention pattern, and nothing else of it changed."""

import json

import pytest
from specimens import ADAPTER, ATTENTION, FIT, POSITION
from training import run, weights

from longlora.stages.retrain import stage
from longlora.training.retrain import Retrain


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
