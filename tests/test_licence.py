"""Licences that are known to allow commercial use are let through, and those that somebody has checked; no other is."""

import json
from pathlib import Path

import pytest

from longlora.model.licence import Licence, measure
from longlora.section import read_params, section_of
from longlora.stages.licence import stage

ROOT = Path(__file__).parent.parent
SHIPPED = section_of(Licence, read_params(ROOT / "params.yaml"), "licence")
NONE = Licence(checked=[])
UNKNOWN = "not known to allow commercial use; if it does, name it in licence.checked"

ALLOWED = [
    "Apache-2.0",
    "apache 2.0",
    "MIT",
    "llama2",
    "Gemma",
    "CC-BY-SA-4.0",
    "CC BY 4.0",
    "ncsa",
    "public domain",
    "Public_Domain",
]
REFUSED = [
    "CC-BY-NC-4.0",
    "cc by-nc-sa 3.0",
    "CC BY NC 4.0",
    "Non-Commercial",
    "noncommercial research",
    "non commercial",
    "Meta research-only license",
    "for research purposes",
    "not for commercial use",
    "All rights reserved",
    "no commercial use",
    "commercial use prohibited",
    "only for research",
    "Tongyi Qianwen RESEARCH LICENSE",
    "CC_BY_NC_4.0",
    "Non\u2011Commercial",
    "personal use only",
    "no license",
    "not specified",
    "unknown",
    " Other ",
    "MIT (non-commercial)",
]


def of(base: str, texts: str, licence: Licence = NONE) -> dict:
    named = {"name": "model", "license": base}, {"name": "books", "license": texts}
    return measure(named[0], texts=named[1], pairs=[], licence=licence)["licence"]


@pytest.mark.parametrize("licence", ALLOWED)
def test_what_is_known_to_allow_commercial_use_is_let_through(licence):
    assert of(licence, licence) == {
        "base": {"value": 1, "reason": f"model is under '{licence}'"},
        "texts": {"value": 1, "reason": f"books is under '{licence}'"},
        "pairs": {"value": 1, "reason": "there are no pairs of another source than the texts"},
    }


@pytest.mark.parametrize("licence", REFUSED)
def test_no_other_is(licence):
    facts = of("MIT", licence)
    assert facts["base"]["value"] == 1
    assert facts["texts"] == {
        "value": 0,
        "reason": f"books is under '{licence.strip()}', which is {UNKNOWN}",
    }


def test_no_licence_is_no_permission():
    assert of(" ", "MIT")["base"] == {
        "value": 0,
        "reason": f"model has no licence stated, and is {UNKNOWN}",
    }


def test_what_somebody_has_checked_is_let_through_word_for_word():
    checked = Licence(checked=["Qwen licence of 2024"])
    assert of("Qwen licence of 2024", "Qwen licence", checked)["base"]["value"] == 1
    assert of("Qwen licence of 2024", "Qwen licence", checked)["texts"]["value"] == 0
    with pytest.raises(ValueError, match="at least 1 character"):
        Licence(checked=[""])


@pytest.mark.parametrize("stated", ["CC-BY-NC-4.0", "cc by-nc-sa 3.0", "CC-BY-NC-SA-2.5", "CC-BY-NC-SA-2.0-FR"])
def test_what_is_known_to_forbid_it_cannot_be_checked_away(stated):
    with pytest.raises(ValueError, match=f"'{stated}' forbids commercial use"):
        Licence(checked=["Qwen licence of 2024", stated])
    own = f"{stated}, and sold to us for every use"
    assert of("MIT", own, Licence(checked=[own]))["texts"]["value"] == 1


@pytest.mark.parametrize("recipe", [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*.yaml"))], ids=lambda r: r.stem)
def test_base_and_texts_of_what_ships_are_let_through(recipe):
    params = read_params(recipe)
    for section in (params[name] for name in ("backbone", "blocks") if "license" in params.get(name, {})):
        assert of(section["license"], section["license"], SHIPPED)["base"]["value"] == 1


def test_the_stage_reads_what_the_data_stages_left(tmp_path):
    for name, licence in (("base", "MIT"), ("texts", "CC-BY-NC-4.0")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "license": licence, "sha256": {}}))
    sources = [{"source": "hub", "name": n, "license": s} for n, s in (("a", "MIT"), ("b", "CC-BY-NC-4.0"))]
    (tmp_path / "pairs.json").write_text(json.dumps({"sources": sources}))
    given = [tmp_path / f"{name}.json" for name in ("base", "texts", "pairs")]
    stage(*given, tmp_path / "scores/licence.json", NONE)
    facts = json.loads((tmp_path / "scores/licence.json").read_text())["licence"]
    assert [facts["base"]["value"], facts["texts"]["value"], facts["pairs"]["value"]] == [1, 0, 0]
    assert facts["pairs"]["reason"] == f"b is under 'CC-BY-NC-4.0', which is {UNKNOWN}"
