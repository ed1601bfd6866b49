"""The gate passes a good model and refuses each kind of bad one for the right reason, by the rules that ship in params.yaml."""

import json
import math
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError
from scipy import stats

from longlora.report.gate import Gate, Rule, judge
from longlora.report.scores import read
from longlora.report.written import written
from longlora.section import read_params, section_of
from longlora.stages.gate import stage

ROOT = Path(__file__).parent.parent
METHOD = "ntk"
SHIPPED = section_of(Gate, read_params(ROOT / "params.yaml"), "gate")
RULES = SHIPPED.under(METHOD)
LENGTHS = ("512", "1024", "4096")
PLACES = 24
TOKENS = 256
# Difficulty differs far more from place to place than from model to model: only a comparison in pairs can tell them apart.
HARDNESS = np.random.default_rng(0).normal(0, 0.5, PLACES)

NATS = {
    "base": {"512": 1.27, "1024": 1.55, "4096": 3.18},
    "linear": {"512": 3.60, "1024": 3.60, "4096": 3.60},
    "yarn": {"512": 1.37, "1024": 1.40, "4096": 1.64},
    "ntk": {"512": 1.33, "1024": 1.38, "4096": 1.66},
    "extended": {"512": 1.26, "1024": 1.26, "4096": 1.26},
}
FOUND = {
    "base": {"512": 1.0, "1024": 0.3, "4096": 0.0},
    "linear": {"512": 0.1, "1024": 0.1, "4096": 0.0},
    "yarn": {"512": 0.8, "1024": 0.6, "4096": 0.2},
    "ntk": {"512": 0.9, "1024": 0.0, "4096": 0.1},
    "extended": {"512": 1.0, "1024": 0.975, "4096": 0.95},
}
FACTS = {name: {"value": 1, "reason": f"{name} is well"} for name in
         ("whole", "sealed", "finite", "logits", "trained", "context", "rope", "tokenizer")} | {
    "window": {"value": 512, "reason": "of the base"}, "target": {"value": 4096, "reason": "trained for"},
}  # fmt: skip


def perplexity_node(nats: float) -> dict:
    if not math.isfinite(nats):
        return {"value": None, "low": None, "high": None, "tokens": PLACES * TOKENS}
    mean = nats + HARDNESS.mean()
    return {"value": math.exp(mean), "low": math.exp(mean - 0.2), "high": math.exp(mean + 0.2)}


LICENCES = {
    "base": {"value": 1, "reason": "m is under 'MIT'"},
    "texts": {"value": 1, "reason": "t is under 'CC0'"},
    "pairs": {"value": 1, "reason": "there are no pairs"},
}


def write(folder: Path, *, nats=NATS, found=FOUND, facts=FACTS, licences=LICENCES) -> Path:
    """Scores as the stages write them."""
    for measure in ("perplexity", "passkey"):
        (folder / measure).mkdir(parents=True)
    (folder / "integrity.json").write_text(json.dumps({"integrity": facts}))
    (folder / "licence.json").write_text(json.dumps({"licence": licences}))
    for model, by_length in nats.items():
        nodes = {n: perplexity_node(v) for n, v in by_length.items()} | {"places": PLACES}
        (folder / f"perplexity/{model}.json").write_text(json.dumps({"perplexity": {model: nodes}}))
        rows = [
            f"{n},{p // 2},{p},{TOKENS},{TOKENS * (v + HARDNESS[p])}"
            for n, v in by_length.items()
            for p in range(PLACES)
        ]
        (folder / f"perplexity/{model}.csv").write_text("\n".join(["length,document,end,tokens,nats", *rows]) + "\n")
    for model, by_length in found.items():
        nodes = {n: {"value": v, "low": v * 0.9, "high": min(1, v + 0.1)} for n, v in by_length.items()}
        (folder / f"passkey/{model}.json").write_text(json.dumps({"passkey": {model: {"prompt": "plain"} | nodes}}))
    return folder


def shipped(scores: dict) -> dict:
    """Those of the models that params.yaml names."""
    return {label: by_length for label, by_length in scores.items() if label != METHOD}


def changed(scores: dict, **extended: float) -> dict:
    """The scores with those of the extended model changed: `at_512=...`."""
    new = deepcopy(scores)
    new["extended"] |= {name.removeprefix("at_"): value for name, value in extended.items()}
    return new


def fact(name: str, reason: str) -> dict:
    return FACTS | {name: {"value": 0, "reason": reason}}


def refusals(folder: Path) -> dict[str, str]:
    verdict = judge(RULES, scores=read(folder))
    refused = {r["name"]: r["reason"] for r in verdict["rules"] if not r["passed"]}
    assert verdict["passed"] is not bool(refused)
    return refused


def gate_of(**keys) -> Gate:
    return section_of(Gate, {"gate": {"rules": RULES.rules, "more_rules": [], "not_asked": []} | keys}, "gate")


def test_a_good_model_passes_every_rule_that_ships(tmp_path):
    assert refusals(write(tmp_path / "scores")) == {}


@pytest.mark.parametrize(
    ("recipe", "solved", "refused", "reason"),
    [  # of RULER's tasks, in short texts and in long ones; all of their passkeys are found
        (
            "smollm2-135m-16k",
            {"base": (0.19, 0.0), "yarn": (0.18, 0.05), "extended": (0.29, 0.0)},
            "it solves RULER's tasks in long texts no worse than untrained YaRN",
            "ruler/extended/4096 is 0, required: at least 0.025",
        ),
        (
            "llama2-7b-32k",
            {"base": (0.85, 0.0), "yarn": (0.8, 0.0), "extended": (0.85, 0.0)},
            "it solves of RULER's tasks in long texts half of what the base solves in short ones",
            "ruler/extended/4096 is 0, required: at least 0.425",
        ),
    ],
)
def test_a_recipes_own_rules_stand_beside_those_that_ship(recipe, solved, refused, reason, tmp_path):
    more = yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text())["gate"]["more_rules"]
    rules = gate_of(more_rules=more)
    assert len(rules.every_rule) == len(RULES.rules) + len(more)
    scores = write(tmp_path / "scores")
    (scores / "ruler").mkdir()
    for model, (short, long) in solved.items():
        tree = {"ruler": {model: {"512": {"value": short}, "4096": {"value": long}, "effective": {"value": 0}}}}
        (scores / f"ruler/{model}.json").write_text(json.dumps(tree))
    found = [rule for rule in judge(rules, scores=read(scores))["rules"] if not rule["passed"]]
    assert [rule["name"] for rule in found] == [refused]
    assert reason in found[0]["reason"]


def test_a_rule_that_a_recipe_leaves_out_is_not_asked_and_the_verdict_says_so(tmp_path):
    scores = read(write(tmp_path / "s", nats=NATS | {"yarn": NATS["extended"]}))
    name, why = "it reads long texts better than untrained YaRN", "nothing is extended"
    assert not judge(RULES, scores=scores)["passed"]
    verdict = judge(gate_of(not_asked=[{"name": name, "why": why}]), scores=scores)
    assert verdict["passed"] and verdict["not_asked"] == [{"name": name, "why": why}]
    assert [rule["name"] for rule in verdict["rules"]] == [rule.name for rule in RULES.rules if rule.name != name]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["it reads long text better than untrained YaRN"],
            "params: gate: not_asked has 'it reads long text better than untrained YaRN', which is no rule of the gate; "
            "did you mean 'it reads long texts better than untrained YaRN'?",
        ),
        ([rule.name for rule in RULES.rules], "params: gate: not_asked leaves no rule of gate.rules"),
    ],
)
def test_what_is_left_out_must_be_a_rule_and_not_all(names, said):
    with pytest.raises(ValueError) as caught:
        gate_of(not_asked=[{"name": name, "why": "so"} for name in names])
    assert str(caught.value) == said


def test_a_rule_is_left_out_for_a_reason():
    with pytest.raises(ValueError, match=r"gate\.not_asked\.0\.why = ' '"):
        gate_of(not_asked=[{"name": RULES.rules[0].name, "why": " "}])


def test_no_two_rules_have_one_name_for_to_leave_out_one_would_leave_out_both():
    for more in ({"rules": [*RULES.rules, RULES.rules[0]]}, {"more_rules": [RULES.rules[0]]}):
        with pytest.raises(ValueError, match="^params: gate: 2 rules are called 'the weights are whole'$"):
            gate_of(**more)


BAD = {
    "NaN weights": (
        {"facts": fact("finite", "1 of 21 tensors holds NaN or infinity, a.weight first"),
         "nats": changed(NATS, at_512=math.nan, at_1024=math.nan, at_4096=math.nan)},
        {"every weight is finite": "1 of 21 tensors holds NaN", "it reads short texts as well as before": "not a number"},
    ),
    "truncated weights": (
        {"facts": fact("whole", "does not open: header too small")},
        {"the weights are whole": "does not open: header too small"},
    ),
    "damaged weights": (
        {"facts": fact("sealed", "model.safetensors is not the file that was written")},
        {"the weights are those that were written": "model.safetensors is not the file"},
    ),
    "non-commercial texts": (
        {"licences": LICENCES | {"texts": {"value": 0, "reason": "t is under 'CC-BY-NC-4.0', which forbids commercial use"}}},
        {"the licence of the texts allows commercial use": "t is under 'CC-BY-NC-4.0'"},
    ),
    "untrained adapter": (
        {"facts": fact("trained", "every weight is the base's"), "nats": NATS | {"extended": NATS["yarn"]},
         "found": FOUND | {"extended": FOUND["yarn"]}},
        {"the adapter has learnt something": "every weight is the base's",
         "it reads long texts better than untrained YaRN": "1 (1 to 1) x perplexity/yarn/4096"},
    ),
    "RoPE missing": (
        {"facts": fact("rope", 'the config has {"rope_type": "default"}')},
        {"the config has the rotary settings of the training": "default"},
    ),
    "context forgotten": (
        {"facts": fact("context", "the config says 512 positions, trained for were 4096")},
        {"the config says the new context": "says 512 positions"},
    ),
    "wrong tokenizer": (
        {"facts": fact("tokenizer", "not the base's tokenizer: other vocabulary")},
        {"the tokenizer is the base's": "other vocabulary"},
    ),
    "leak-trained": (
        {"nats": changed(NATS, at_512=2.6, at_1024=2.9, at_4096=3.4)},
        {"it reads long texts as well as the base reads short ones": "perplexity/extended/4096 is",
         "it reads long texts better than the base": "perplexity/base/4096",
         "it reads short texts as well as before": "perplexity/base/512"},
    ),
    "short context lost": (
        {"nats": changed(NATS, at_512=1.27 + math.log(1.08))},
        {"it reads short texts as well as before": "1.08 (1.08 to 1.08) x perplexity/base/512 = 3.363"},
    ),
    "short retrieval lost": (
        {"found": changed(FOUND, at_512=0.85)},
        {"it retrieves from short texts as well as before": "is 0.85, required: at least 0.9 (0.9 x passkey/base/512 = 1)"},
    ),
    "perplexity without retrieval": (
        {"found": changed(FOUND, at_4096=0.1)},
        {"it retrieves from long texts": "passkey/extended/4096 is 0.1, required: at least 0.8",
         "it retrieves from long texts no worse than untrained YaRN": "at least 0.15 (-0.05 + passkey/yarn/4096 = 0.2)"},
    ),
    "worse than untrained YaRN": (
        {"nats": changed(NATS, at_4096=1.66)},
        {"it reads long texts better than untrained YaRN": "perplexity/extended/4096 is"},
    ),
    "the scaling's gain passed off as the training's": (
        {"nats": NATS | {METHOD: NATS["extended"]}, "found": FOUND | {METHOD: FOUND["extended"]}},
        {"it reads long texts better than before it was trained": "1 (1 to 1) x perplexity/ntk/4096"},
    ),
    "gained by the kind of text, in short texts as well": (
        {"nats": NATS | {METHOD: {"512": 1.33, "1024": 1.33, "4096": 1.32}}},
        {"training has gained more in long texts than in short ones":
         "perplexity/extended/4096 is 0.9418 of perplexity/ntk/4096, where perplexity/extended/512 is 0.9324 of "
         "perplexity/ntk/512: 1.01 (1.01 to 1.01) x, required: at most 1 x"},
    ),
    "retrieval lost that the scaling had": (
        {"found": FOUND | {METHOD: {"512": 1.0, "1024": 1.0, "4096": 1.0}, "extended": {"512": 1.0, "1024": 1.0, "4096": 0.9}}},
        {"it retrieves from long texts no worse than before it was trained": "at least 0.95 (-0.05 + passkey/ntk/4096 = 1)"},
    ),
    "nothing read in the middle": (
        {"nats": changed(NATS, at_1024=math.nan)},
        {"every score is a number": "1 score is no number, perplexity/extended/1024 first",
         "it reads long texts as well as the base reads short ones": "perplexity/extended/1024 is not a number",
         "it reads long texts as well as it reads short ones": "perplexity/extended/1024 is not a number"},
    ),
    "read worse than the base reads before it breaks, which its config does not say": (
        {"nats": changed(NATS, at_4096=1.58), "facts": FACTS | {"window": {"value": 1024, "reason": "says the config"}}},
        {"it reads long texts as well as the base reads short ones": "1.363 (1.363 to 1.363) x perplexity/base/512"},
    ),
    "read worse in the middle": (
        {"nats": changed(NATS, at_1024=1.27 + math.log(1.08))},
        {"it reads long texts as well as the base reads short ones": "perplexity/extended/1024 is 3.632, 1.08"},
    ),
    "lost by context what was won by the kind of text": (
        {"nats": changed(NATS, at_512=1.10, at_1024=1.13, at_4096=1.26)},
        {"it reads long texts as well as it reads short ones": "1.174 (1.174 to 1.174) x perplexity/extended/512"},
    ),
    "nothing found in the middle": (
        {"found": changed(FOUND, at_1024=0.0)},
        {"it retrieves from long texts": "passkey/extended/1024 is 0, required: at least 0.8",
         "it retrieves from long texts no worse than untrained YaRN": "at least 0.55 (-0.05 + passkey/yarn/1024 = 0.6)"},
    ),
    "the middle never scored": (
        {"found": FOUND | {"extended": {"512": 1.0, "4096": 1.0}}},
        {"it retrieves from long texts": "passkey/extended/1024 was not scored; there are 512, 4096"},
    ),
    "target never scored": (
        {"found": FOUND | {"extended": {"512": 1.0, "1024": 1.0}}},
        {"it retrieves from long texts": "passkey/extended/4096 was not scored; there are 512, 1024"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_model_is_refused_for_its_reason(kind, tmp_path):
    scores, expected = BAD[kind]
    refused = refusals(write(tmp_path / "scores", **scores))
    for name, reason in expected.items():
        assert reason in refused[name]


@pytest.mark.parametrize(
    "kind",
    [
        "the scaling's gain passed off as the training's",
        "gained by the kind of text, in short texts as well",
        "retrieval lost that the scaling had",
        "short context lost",
        "short retrieval lost",
        "nothing read in the middle",
        "lost by context what was won by the kind of text",
        "nothing found in the middle",
        "RoPE missing",
        "wrong tokenizer",
        "damaged weights",
        "non-commercial texts",
    ],
)
def test_one_defect_is_refused_by_one_rule(kind, tmp_path):
    scores, expected = BAD[kind]
    assert refusals(write(tmp_path / "scores", **scores)).keys() == expected.keys()


def verdict_of(folder: Path, **rule) -> tuple[bool, str]:
    verdict = judge(Gate(rules=[Rule(name="claim", **rule)], more_rules=[], not_asked=[]), scores=read(folder))
    return verdict["passed"], verdict["rules"][0]["reason"]


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"at_least": 0.95}, True),
        ({"at_least": 0.951}, False),
        ({"at_most": 0.95}, True),
        ({"at_most": 0.949}, False),
        ({"at_least": 0.95, "with_interval": True}, False),
        ({"at_least": 0.85, "with_interval": True}, True),
        ({"at_most": 0.95, "with_interval": True}, False),
        ({"at_least": 0.95, "times": "passkey/base/512"}, True),
        ({"at_least": 0.95, "times": "passkey/base/512", "with_interval": True}, False),
        ({"at_least": 0.95, "times": "passkey/base/target", "with_interval": True}, True),  # of which none are found
        ({"at_least": 0.74, "plus": "passkey/yarn/target"}, True),
        ({"at_least": 0.76, "plus": "passkey/yarn/target"}, False),
    ],
)
def test_bounds_references_and_unfavourable_ends(rule, passed, tmp_path):
    assert verdict_of(write(tmp_path / "s"), metric="passkey/extended/target", **rule)[0] is passed


@pytest.mark.parametrize(
    ("keys", "ours", "theirs", "rule"),
    [
        (60, 36, 40, {"at_least": 0.9, "times": "passkey/base/512"}),
        (40, 6, 8, {"at_least": -0.05, "plus": "passkey/base/512"}),
        (140, 4, 8, {"at_least": 0.5, "times": "passkey/base/512"}),
        (60, 40, 20, {"at_most": 2.0, "times": "passkey/base/512"}),
    ],
)
def test_a_bound_that_is_just_reached_holds_whichever_way_shares_were_rounded(keys, ours, theirs, rule, tmp_path):
    for found, passed in ((ours, True), (ours + (1 if "at_most" in rule else -1), False)):
        shares = {"base": {"512": round(theirs / keys, 6)}, "extended": {"512": round(found / keys, 6)}}
        folder = write(tmp_path / str(found), found=shares)
        assert verdict_of(folder, metric="passkey/extended/512", **rule)[0] is passed


def test_a_model_that_breaks_between_the_measured_lengths_is_refused_band_by_band_where_that_is_asked(tmp_path):
    folder = write(tmp_path / "s")
    rule = {"metric": "position_nats/extended/long", "at_most": 0.1, "plus": "position_nats/extended/window"}
    for broken, passed in ((None, True), ("2816", False)):
        bands = {str(end): {"value": 2.6 if str(end) == broken else 1.3} for end in range(256, 4097, 256)}
        (folder / "bands.json").write_text(json.dumps({"position_nats": {"extended": bands}}))
        assert refusals(folder) == {}
        held, reason = verdict_of(folder, **rule)
        assert held is passed and (
            passed or reason.startswith("position_nats/extended/2816 is 2.6, required: at most 1.4")
        )


def test_pairs_tell_models_apart_whose_own_intervals_overlap(tmp_path):
    nats = changed(NATS, at_4096=1.62)
    rule = {
        "metric": "perplexity/extended/4096",
        "at_most": 1.0,
        "times": "perplexity/yarn/4096",
        "with_interval": True,
    }
    folder = write(tmp_path / "s", nats=nats)
    assert verdict_of(folder, **rule)[0]
    for file in folder.rglob("*.csv"):
        file.unlink()
    assert not verdict_of(folder, **rule)[0]


def test_a_ratio_of_places_that_differ_is_not_taken(tmp_path):
    folder = write(tmp_path / "s")
    file = folder / "perplexity/yarn.csv"
    file.write_text(file.read_text().replace("4096,3,7,", "4096,4,7,"))
    rule = {
        "metric": "perplexity/extended/4096",
        "at_most": 1.0,
        "times": "perplexity/yarn/4096",
        "with_interval": True,
    }
    assert "(with its interval" in verdict_of(folder, **rule)[1]


def test_a_ratio_beyond_any_number_is_refused_as_too_high(tmp_path):
    folder = write(tmp_path / "s")
    file = folder / "perplexity/extended.csv"
    head, *rows = file.read_text().splitlines()
    far = [  # every other document by so much more as its neighbour by less: the mean stays
        f"{row.rpartition(',')[0]},{float(row.rpartition(',')[2]) + TOKENS * 1e4 * (-1) ** (i % PLACES // 2)}"
        for i, row in enumerate(rows)
    ]
    file.write_text("\n".join([head, *far]))
    passed, reason = verdict_of(
        folder,
        metric="perplexity/extended/4096",
        at_most=1.0,
        times="perplexity/yarn/4096",
        with_interval=True,
    )
    assert not passed and "(0 to inf) x perplexity/yarn/4096" in reason


def test_places_of_another_models_measurement_are_told_from_the_scores(tmp_path):
    folder = write(tmp_path / "s", nats=NATS | {"extended": NATS["linear"]})
    good = write(tmp_path / "good")
    shutil.copy(good / "perplexity/extended.csv", folder / "perplexity/extended.csv")
    reason = refusals(folder)["it reads long texts better than untrained YaRN"]
    assert reason.endswith("is 7.099, and by its places 0.6839: they are of two measurements")


def test_an_uncertain_ratio_is_refused_though_its_value_holds(tmp_path):
    folder = write(tmp_path / "s")
    file = folder / "perplexity/extended.csv"
    noise = iter(np.random.default_rng(1).normal(-0.01, 0.5, 3 * PLACES))
    head, *rows = file.read_text().splitlines()
    noisy = [
        f"{row.rpartition(',')[0]},{TOKENS * (1.64 + HARDNESS[i % PLACES] + next(noise))}" for i, row in enumerate(rows)
    ]
    file.write_text("\n".join([head, *noisy]) + "\n")
    value = math.exp(np.mean([float(row.rpartition(",")[2]) for row in noisy[-PLACES:]]) / TOKENS)
    tree = {"perplexity": {"extended": {"4096": {"value": value}}}}
    (folder / "perplexity/extended.json").write_text(json.dumps(tree))
    rule = {"metric": "perplexity/extended/4096", "at_most": 1.0, "times": "perplexity/yarn/4096"}
    assert verdict_of(folder, **rule)[0]
    assert not verdict_of(folder, **rule, with_interval=True)[0]


GAIN = {"metric": "perplexity/extended/4096", "at_most": 1.0, "times": "perplexity/yarn/4096", "ratio_at": "512"}


def with_noise(folder: Path, label: str, noise: np.ndarray) -> None:
    """Nats per token of `label` at 4,096 tokens, place by place, on top of what they are."""
    file = folder / f"perplexity/{label}.csv"
    head, *rows = file.read_text().splitlines()
    fields = [row.split(",") for row in rows]
    nats = {int(f[2]): float(f[4]) / TOKENS for f in fields if f[0] == "4096"}
    for f in fields:
        if f[0] == "4096":
            f[4] = str(TOKENS * (nats[int(f[2])] + noise[int(f[2])]))
    file.write_text("\n".join([head, *(",".join(f) for f in fields)]) + "\n")
    mean = np.mean([nats[place] + noise[place] for place in range(PLACES)])
    tree = json.loads((folder / f"perplexity/{label}.json").read_text())
    tree["perplexity"][label]["4096"] = {"value": math.exp(mean)}
    (folder / f"perplexity/{label}.json").write_text(json.dumps(tree))


def test_gains_are_compared_place_by_place_and_document_by_document(tmp_path):
    """What both models find hard in the long texts cancels out; what one alone does is counted, two places of a document as one."""
    folder, generator = write(tmp_path / "s"), np.random.default_rng(2)
    shared, own = generator.normal(0, 0.5, PLACES), generator.normal(0, 0.3, PLACES // 2).repeat(2)
    with_noise(folder, "yarn", shared)
    with_noise(folder, "extended", shared + own)
    gain = (1.26 - 1.64) - (1.26 - 1.37) + own
    by_document = gain.reshape(-1, 2).mean(1)
    low, high = stats.t.interval(0.95, PLACES // 2 - 1, by_document.mean(), stats.sem(by_document))
    passed, reason = verdict_of(folder, **GAIN, with_interval=True)
    assert passed
    assert f": {np.exp(gain.mean()):.4g} ({np.exp(low):.4g} to {np.exp(high):.4g}) x, required: at most 1 x" in reason
    just = (float(np.exp(gain.mean())) + float(np.exp(high))) / 2  # between the value and the end of its interval
    assert verdict_of(folder, **GAIN | {"at_most": just})[0]
    assert not verdict_of(folder, **GAIN | {"at_most": just}, with_interval=True)[0]
    assert verdict_of(folder, **GAIN | {"at_most": None, "at_least": 0.5}, with_interval=True)[0]
    assert not verdict_of(folder, **GAIN | {"at_most": None, "at_least": 0.9}, with_interval=True)[0]


def test_gains_that_are_just_equal_hold_whichever_way_shares_were_rounded(tmp_path):
    shares = {"extended": (20 / 60, 30 / 60), "yarn": (40 / 60, 60 / 60)}
    found = {label: {"4096": round(long, 6), "512": round(short, 6)} for label, (long, short) in shares.items()}
    rule = {"metric": "passkey/extended/4096", "times": "passkey/yarn/4096", "ratio_at": "512"}
    for bound in ("at_least", "at_most"):
        assert verdict_of(write(tmp_path / bound, found=FOUND | found), **rule, **{bound: 1})[0]


def test_a_metric_is_not_compared_with_itself(tmp_path):
    """A model that was trained inside the base's window has its target there, too."""
    folder = write(tmp_path / "s", facts=FACTS | {"target": {"value": 512, "reason": "trained for"}})
    rule = {"metric": "perplexity/extended/target", "at_most": 1.05, "times": "perplexity/extended/window"}
    assert verdict_of(folder, **rule, with_interval=True) == (
        False,
        "perplexity/extended/512 cannot be compared with itself",
    )


def test_gains_that_cannot_be_compared_are_refused(tmp_path):
    folder = write(tmp_path / "s", found=FOUND | {"yarn": {"512": 0.0, "4096": 0.2}})
    passed, reason = verdict_of(
        folder, **GAIN | {"metric": "perplexity/extended/window", "times": "perplexity/yarn/window"}
    )
    assert not passed and "perplexity/extended/512 cannot be compared with itself: 512 is the same length" in reason
    keys = {"metric": "passkey/extended/target", "times": "passkey/yarn/target", "at_least": 1, "ratio_at": "window"}
    assert verdict_of(folder, **keys) == (False, "passkey/yarn/512 is 0, to which nothing has a ratio")
    file = folder / "perplexity/yarn.csv"
    file.write_text("\n".join(row for row in file.read_text().splitlines() if not row.startswith("512,3,")) + "\n")
    assert verdict_of(folder, **GAIN)[0]
    passed, reason = verdict_of(folder, **GAIN, with_interval=True)
    assert not passed and "has no interval: not all four were scored at the same places" in reason
    file.write_text("\n".join(row for row in file.read_text().splitlines() if not row.startswith("512,")) + "\n")
    passed, reason = verdict_of(folder, **GAIN | {"ratio_at": "2048"})
    assert not passed and "perplexity/extended/2048 was not scored" in reason


def test_window_is_the_longest_scored_length_inside_the_bases(tmp_path):
    facts = FACTS | {"window": {"value": 1500, "reason": "of the base"}}
    assert (
        "passkey/base/1024 is 0.3"
        in verdict_of(write(tmp_path / "a", facts=facts), metric="passkey/base/window", at_least=1)[1]
    )
    assert verdict_of(tmp_path / "a", metric="passkey/base/lowest", at_least=1)[1].startswith(
        "passkey/base/1024 is 0.3,"
    )
    assert verdict_of(tmp_path / "a", metric="perplexity/base/lowest", at_least=1)[1].startswith(
        "perplexity/base/512 is"
    )
    facts = FACTS | {"window": {"value": 511, "reason": "of the base"}}
    passed, reason = verdict_of(write(tmp_path / "b", facts=facts), metric="passkey/base/window", at_least=0)
    assert not passed and "no length from 256 up to the base's window, 511, was scored" in reason


@pytest.mark.parametrize("measure", ["perplexity", "passkey"])
def test_what_is_read_and_found_in_a_few_tokens_says_nothing_of_the_bases_window(measure, tmp_path):
    """Measured at 512 alone, half of what the base reads at 4,096 passed for as well as before, and for as well as the base."""
    facts = FACTS | {"window": {"value": 2049, "reason": "of the base"}}
    folder = write(tmp_path / "half", facts=facts)
    for path in ("base/window", "base/lowest", "extended/short"):
        reason = verdict_of(folder, metric=f"{measure}/{path}", at_least=0)[1]
        assert reason.endswith("no length from 1025 up to the base's window, 2049, was scored")
    facts |= {"target": {"value": 2048, "reason": "tuned inside of it"}}
    assert verdict_of(write(tmp_path / "tuned", facts=facts), metric=f"{measure}/base/window", at_least=0)[0]


def test_short_and_long_ask_every_length_inside_and_beyond_the_bases_window(tmp_path):
    facts = FACTS | {"window": {"value": 1500, "reason": "of the base"}}
    folder = write(tmp_path / "s", facts=facts)
    passed, reason = verdict_of(folder, metric="passkey/base/short", at_least=0.3, times="passkey/extended/short")
    assert passed
    assert reason == (
        "passkey/base/512 is 1, required: at least 0.3 (0.3 x passkey/extended/512 = 1); "
        "passkey/base/1024 is 0.3, required: at least 0.2925 (0.3 x passkey/extended/1024 = 0.975)"
    )
    assert verdict_of(folder, metric="passkey/base/short", at_least=0.5) == (
        False, "passkey/base/1024 is 0.3, required: at least 0.5",
    )  # fmt: skip
    assert verdict_of(folder, metric="passkey/yarn/long", at_least=0)[1].startswith("passkey/yarn/4096 is 0.2")
    facts = FACTS | {"window": {"value": 511, "reason": "of the base"}}
    passed, reason = verdict_of(write(tmp_path / "none", facts=facts), metric="passkey/base/short", at_least=0)
    assert not passed and reason == "passkey/base: no length from 256 up to the base's window, 511, was scored"


def test_long_is_at_least_the_target_though_it_lies_inside_the_bases_window(tmp_path):
    facts = FACTS | {"window": {"value": 8192, "reason": "of the base"}, "target": {"value": 2048, "reason": ""}}
    passed, reason = verdict_of(write(tmp_path / "s", facts=facts), metric="passkey/base/long", at_least=0)
    assert not passed and reason.startswith("passkey/base/2048 was not scored")


def test_a_score_that_is_not_a_number_is_refused_whatever_it_measures(tmp_path):
    folder = write(tmp_path / "s")
    bands = {"2048": {"value": 1.2, "low": 1.1, "high": 1.3}, "4096": {"value": None, "low": None, "high": None}}
    for label in ("yarn", "extended"):
        (folder / f"{label}.json").write_text(json.dumps({"position_nats": {label: bands}}))
        refused = refusals(folder)
        assert refused.keys() == ({"every score is a number"} if label == "extended" else set())
    assert "position_nats/extended/4096 first" in refused["every score is a number"]


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("perplexity/extnded/target", "perplexity/extnded was not scored; there are extended"),
        ("perplexty/extended/target", "perplexty was not scored; there are perplexity"),
        ("passkey/base/2048", "passkey/base/2048 was not scored; there are"),
        ("passkey/base", "passkey/base is not a number"),
        ("passkey/base/512/value/more", "was not scored; there are no scores"),
    ],
)
def test_what_is_missing_is_refused_and_the_nearest_is_named(metric, reason, tmp_path):
    passed, said = verdict_of(write(tmp_path / "s"), metric=metric, at_least=0)
    assert not passed and reason in said


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ([], "at least 1"),
        ([{"name": "n", "metric": "m"}], "one of at_most and at_least"),
        ([{"name": "n", "metric": "m", "at_most": 1, "at_least": 1}], "one of at_most and at_least"),
        ([{"name": "n", "metric": "m", "at_most": 1, "times": "a", "plus": "b"}], "both times and plus"),
        ([{"name": "n", "metric": "m/e/target", "at_most": 1, "times": "m/b/long"}], "long in its reference alone"),
        ([{"name": "n", "metric": "m", "at_most": 1, "times": ""}], r"rules\.0\.times"),
        ([{"name": " ", "metric": "m", "at_most": 1}], r"rules\.0\.name"),
        ([{"name": "n", "metric": "m", "at_mots": 1}], "at_mots"),
        ([{"name": "n", "metric": "m/e/target", "at_most": 1, "ratio_at": "window"}], "ratio_at, which takes times"),
        (
            [{"name": "n", "metric": "m/e", "at_most": 1, "times": "m/b", "ratio_at": "window"}],
            "one and the same length",
        ),
        (
            [{"name": "n", "metric": "m/e/7", "at_most": 1, "times": "m/b/8", "ratio_at": "9"}],
            "one and the same length",
        ),
        ([{"name": "n", "metric": "m/e/long", "at_most": 1, "times": "m/b/long", "ratio_at": "7"}], "one and the same"),
        ([{"name": "n", "metric": "m/e/7", "at_most": 1, "times": "m/b/7", "ratio_at": "lowest"}], "one other length"),
        (
            [
                {
                    "name": "n",
                    "metric": "passkey/e/7",
                    "at_most": 1,
                    "times": "passkey/b/7",
                    "ratio_at": "9",
                    "with_interval": True,
                }
            ],
            "takes perplexities",
        ),
        (
            [{"name": "n", "metric": "m/e/7", "at_most": 1, "times": "m/b/7", "ratio_at": "7"}],
            "one other length is meant",
        ),
        ([{"name": "n", "metric": "m/e/7", "at_most": 1, "times": "m/b/7", "ratio_at": "short"}], "one other length"),
        ([{"name": "n", "metric": "m", "at_most": math.nan}], "finite"),
    ],
)
def test_rules_that_mean_nothing_are_an_error(rules, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Gate.model_validate({"rules": rules})


def test_scores_that_are_none_or_no_json_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no scores below"):
        read(tmp_path)
    (tmp_path / "a.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(ValueError, match=r"a\.json: line 2"):
        read(tmp_path)


def test_two_files_with_the_same_score_are_an_error(tmp_path):
    folder = write(tmp_path / "s")
    (folder / "zz.json").write_text(json.dumps({"passkey": {"extended": {"4096": {"value": 1.0}}}}))
    with pytest.raises(ValueError, match=r"zz\.json says passkey/extended/4096/value, as another file"):
        read(folder)


@pytest.mark.parametrize("name", ["zz.json", "ruler/extended.json", "perplexity/champion.csv"])
def test_a_file_of_scores_that_no_stage_writes_is_an_error(name, tmp_path):
    folder = write(tmp_path / "s", nats=shipped(NATS), found=shipped(FOUND))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is of no stage that dvc.yaml has"):
        stage(ROOT / "params.yaml", folder, tmp_path / "verdict.json", SHIPPED)
    assert not (tmp_path / "verdict.json").exists()


def test_the_files_that_stages_write_are_those_that_dvc_knows_of(tmp_path):
    from dvc.repo import Repo

    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    lists = {
        given[2:-1]
        for one in pipeline["stages"].values()
        for given in one.get("matrix", {}).values()
        if isinstance(given, str)
    }
    params = OmegaConf.load(ROOT / "params.yaml")
    for key in lists:
        OmegaConf.update(params, key, ["one", "two"])
    OmegaConf.save(params, tmp_path / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with Repo.init(str(tmp_path)) as repo:
        outs = {out.fs_path for out in repo.index.outs}
    known = {Path(out).relative_to(tmp_path / "metrics/scores").as_posix() for out in outs if "/metrics/scores/" in out}
    assert written(pipeline, params=read_params(tmp_path / "params.yaml")) == known
    assert {
        "integrity.json",
        "passkey/two.json",
        "perplexity/one.csv",
        "ruler/two.json",
        "longppl/one/two.json",
    } <= known


def test_stage_writes_a_refusal_as_a_result_with_strict_json_and_the_same_bytes_again(tmp_path):
    bad = BAD["NaN weights"][0]
    folder = write(tmp_path / "s", facts=bad["facts"], nats=shipped(bad["nats"]), found=shipped(FOUND))
    stage(ROOT / "params.yaml", folder, tmp_path / "out/verdict.json", SHIPPED)
    first = (tmp_path / "out/verdict.json").read_bytes()
    verdict = json.loads(first, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert verdict["passed"] is False
    assert [r["name"] for r in verdict["rules"]] == [r.name for r in RULES.every_rule]
    stage(ROOT / "params.yaml", folder, tmp_path / "out/verdict.json", SHIPPED)
    assert (tmp_path / "out/verdict.json").read_bytes() == first
