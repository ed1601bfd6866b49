"""params.yaml under recipes and overrides."""

import pytest
import yaml

from tasks.overlay import merged, read_text, recipe_file

PARAMS = """
# a comment that must survive
fit: {steps: 100, rate: 2.0e-5, betas: [0.9, 0.95], name: null, fast: true}
gate: {rules: [], least: {words: 1}, most: {words: 9}}
"""


def test_what_changes_nothing_gives_back_the_very_same_text():
    assert merged(PARAMS) == PARAMS
    assert merged(PARAMS, overrides=["fit.steps=100", "fit.rate=2e-5"]) == PARAMS
    assert merged(PARAMS, recipe="fit: {steps: 100}") == PARAMS


def test_recipe_then_overrides_the_last_word_wins_and_the_rest_stays():
    text = merged(
        PARAMS, recipe="fit: {steps: 5, name: a}", overrides=["fit.steps=7", "fit.betas=[0.5, 0.6]", "fit.steps=8"]
    )
    assert yaml.safe_load(text) == {
        "fit": {"steps": 8, "rate": 2.0e-5, "betas": [0.5, 0.6], "name": "a", "fast": True},
        "gate": {"rules": [], "least": {"words": 1}, "most": {"words": 9}},
    }


def test_small_numbers_stay_numbers_for_every_reader():
    text = merged(PARAMS, overrides=["fit.rate=3e-7"])
    assert yaml.safe_load(text)["fit"]["rate"] == 3e-7  # PyYAML reads 3e-7 as text, and 3.0e-07 as a number


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fit.step=3", r"unknown key 'fit.step'; did you mean 'steps'\?"),
        ("fti.steps=3", r"unknown key 'fti'; did you mean 'fit'\?"),
        ("steps=3", r"^unknown key 'steps'; did you mean 'fit.steps'\?$"),
        ("gate.words=3", r"^unknown key 'gate.words'; did you mean 'gate.least.words' or 'gate.most.words'\?$"),
        ("fit.steps=many", "fit.steps = 'many': must be a number"),
        ("fit.fast=3", "^fit.fast = 3: must be true or false, as in fit.fast = true$"),
        ("fit.steps=true", "^fit.steps = true: must be a number"),
        ("fit.betas=3", "must be a list"),
        ("fit=3", "^fit = 3: must be a section: name a key of it, such as fit.steps$"),
        ("fit.steps={a: 1}", "must be a number"),
        ("fit.rate=.inf", "must be finite"),
        ("fit.steps", "must be key=value"),
        ("=3", "must be key=value"),
        ("fit.name=${oc.env:HOME}", "write the value itself"),
        ("fit.steps=[1", "not readable as YAML"),
    ],
)
def test_a_slip_is_one_line_with_the_rule(override, said):
    with pytest.raises(ValueError, match=said) as caught:
        merged(PARAMS, overrides=[override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET_TOKEN}", "[a, 'b ${oc.env:SECRET_TOKEN}']", "${fit.steps}", r'"\x24{oc.env:SECRET_TOKEN}"'],
)
def test_no_layer_reads_the_environment_or_another_key_into_a_run(monkeypatch, value):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    said = r"write the value itself, not a reference to one: .*\$\{.*\}"
    text = f"fit:\n  steps: 1\n  name: {value}\ngate: {{rules: []}}  # a comment may hold ${{it}}\n"
    with pytest.raises(ValueError, match=rf"^the recipe: {said}") as caught:
        merged(PARAMS, recipe=text)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^params.yaml: {said}"):
        merged(text)
    with pytest.raises(ValueError, match=rf"^--set fit.name: {said}"):
        merged(PARAMS, overrides=[f"fit.name={value}"])
    assert merged(PARAMS, recipe=f"{text}".replace(value, "a")) != PARAMS


@pytest.mark.parametrize("recipe", ["fit: [", "- a", "fit: {steps: 1, steps: 2}", "other: 1", "", "# fit:\n"])
def test_a_bad_recipe_is_one_line(recipe):
    with pytest.raises(ValueError) as caught:
        merged(PARAMS, recipe=recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bgi", "../secret", "/etc/passwd", "", "shapes"])
def test_a_recipe_is_one_of_the_folder(tmp_path, name):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "big.yaml").touch()
    (tmp_path / "recipes" / "shapes.yaml").touch()
    (tmp_path / "secret.yaml").touch()
    assert recipe_file(tmp_path, "big") == tmp_path / "recipes" / "big.yaml"
    with pytest.raises(ValueError, match=f"^no recipe '{name}'; (did you mean 'big'|there are: big$)"):
        recipe_file(tmp_path, name)


@pytest.mark.parametrize("name", ["recipes/big-model.yaml", "big-model.yaml", "/tmp/big-model.yml"])
def test_a_recipe_named_as_a_file_is_answered_with_its_name(tmp_path, name):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "big-model.yaml").touch()
    with pytest.raises(ValueError, match=r"; did you mean 'big-model'\?$"):
        recipe_file(tmp_path, name)


def test_a_file_that_is_no_text_and_a_folder_among_the_recipes_are_said(tmp_path):
    (tmp_path / "recipes" / "folder.yaml").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^no recipe 'folder'; there are: none$"):
        recipe_file(tmp_path, "folder")
    (tmp_path / "recipes" / "mine.yaml").write_bytes(b"fit: {name: \xff}")
    with pytest.raises(ValueError, match=r"^mine.yaml must be text in UTF-8: byte 12 is none$"):
        read_text(recipe_file(tmp_path, "mine"))
    (tmp_path / "params.yaml").write_text("fit: {name: für}", encoding="utf-8")
    assert merged(read_text(tmp_path / "params.yaml")) == "fit: {name: für}"
