"""Licences that keep commercial use out are recognised in the words people write them in; the others are not."""

import json

import pytest

from longlora.model.licence import measure
from longlora.stages.licence import stage

ALLOWED = [
    "Apache-2.0",
    "MIT",
    "llama2",
    "CC-BY-SA-4.0",
    "public domain (US presidential messages)",
    "Gemma, of Google Inc.",
    "ncsa",
    "commercial use allowed",
]
FORBIDDEN = [
    "CC-BY-NC-4.0",
    "cc by-nc-sa 3.0",
    "CC BY NC 4.0",
    "Non-Commercial",
    "noncommercial research",
    "non commercial",
    "Meta research-only license",
    "for research purposes",
    "not for commercial use",
]


def of(base: str, texts: str) -> dict:
    return measure({"name": "model", "license": base}, texts={"name": "books", "license": texts})["licence"]


@pytest.mark.parametrize("licence", ALLOWED)
def test_what_allows_commercial_use_is_let_through(licence):
    assert of(licence, licence) == {
        "base": {"value": 1, "reason": f"model is under '{licence}'"},
        "texts": {"value": 1, "reason": f"books is under '{licence}'"},
    }


@pytest.mark.parametrize("licence", FORBIDDEN)
def test_what_forbids_it_is_named(licence):
    facts = of("MIT", licence)
    assert facts["base"]["value"] == 1
    assert facts["texts"] == {"value": 0, "reason": f"books is under '{licence}', which forbids commercial use"}


@pytest.mark.parametrize("licence", ["", "unknown", " Other "])
def test_no_licence_is_no_permission(licence):
    assert of(licence, "MIT")["base"] == {
        "value": 0,
        "reason": "no licence is stated for model: say it in params.yaml",
    }


def test_the_stage_reads_what_the_data_stages_left(tmp_path):
    for name, licence in (("base", "MIT"), ("texts", "CC-BY-NC-4.0")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "license": licence, "sha256": {}}))
    stage(tmp_path / "base.json", tmp_path / "texts.json", tmp_path / "scores/licence.json")
    facts = json.loads((tmp_path / "scores/licence.json").read_text())["licence"]
    assert [facts["base"]["value"], facts["texts"]["value"]] == [1, 0]
