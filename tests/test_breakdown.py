"""Buckets are named by their upper ends, hold every question once, and are scored as the questions in them alone would be."""

import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from longlora.evaluation.breakdown import PARTED, Marked, by_depth, by_length, overall, upper_depth, upper_length
from tasks.entities import measured


@pytest.mark.parametrize(
    ("tokens", "longest", "end"),
    [(1, 1000, 1), (2, 1000, 2), (3, 1000, 4), (512, 1024, 512), (513, 1024, 1024), (513, 1000, 1000), (1000, 1000, 1000),
     (1001, 1000, 1024), (1025, 1000, 2048), (513, 512, 1024), (511, 512, 512), (70_000, 102_400, 102_400)],
)  # fmt: skip
def test_a_length_belongs_to_the_power_of_two_or_the_longest_prompt_above_it(tokens, longest, end):
    assert upper_length(tokens, longest=longest) == end


@pytest.mark.parametrize(
    ("depth", "end"), [(0, 0.25), (0.25, 0.25), (0.2501, 0.5), (0.5, 0.5), (0.74, 0.75), (0.99, 1), (1, 1)]
)
def test_a_depth_belongs_to_its_quarter(depth, end):
    assert upper_depth(depth) == end


def questions(count: int) -> list[Marked]:
    """Every fourth has no evidence."""
    dice = random.Random(count)
    made = []
    for number in range(count):
        scores = {"exact": float(dice.random() < 0.4), "f1": dice.random(), "rouge_l": dice.random()}
        depth = dice.random() if number % 4 else None
        if depth is not None:
            scores |= {"evidence": float(dice.random() < 0.7), "evidence_floor": float(dice.random() < 0.5)}
        made.append(Marked(scores, source=str(number), tokens=dice.randrange(90, 1500), depth=depth))
    return made


MARKED = questions(240)
ENDS = (128, 256, 512, 1000, 1024, 2048)


def test_every_score_is_the_mean_over_the_questions_that_have_it():
    found = overall(MARKED)
    assert list(found) == ["exact", "f1", "rouge_l", "evidence", "evidence_floor"]
    for name, node in found.items():
        shares = [q.scores[name] for q in MARKED if name in q.scores]
        assert node["trials"] == len(shares) == (180 if name.startswith("evidence") else 240)
        assert node["value"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
        assert node["low"] < node["value"] < node["high"]
    hits = np.array([q.scores["evidence"] for q in MARKED if "evidence" in q.scores])
    exact = stats.binomtest(int(hits.sum()), 180).proportion_ci(method="exact")
    between = stats.ttest_1samp(hits, 0).confidence_interval(0.95)
    wider = min(exact.low, between.low), max(exact.high, between.high)
    assert (found["evidence"]["low"], found["evidence"]["high"]) == pytest.approx(wider, abs=1e-5)


@pytest.mark.parametrize("name", PARTED)
def test_lengths_and_the_depths_within_them_are_those_of_their_questions_alone(name):
    found = by_length(MARKED, name=name, longest=1000)
    assert list(found) == [str(end) for end in ENDS]
    for low, end in zip((0, *ENDS), ENDS, strict=False):
        inside = [q for q in MARKED if low < q.tokens <= end and name in q.scores]
        depths = found[str(end)].pop("depth")
        assert found[str(end)] == overall(inside)[name]
        assert sum(node["trials"] for node in depths.values()) == sum(q.depth is not None for q in inside)
        for upper, node in depths.items():
            here = [q for q in inside if q.depth is not None and float(upper) - 0.25 < q.depth <= float(upper)]
            assert node == overall(here)[name]


def test_depths_are_of_the_questions_with_evidence():
    found = by_depth(MARKED)
    assert list(found) == ["0.25", "0.50", "0.75", "1.00"]
    assert {name: sum(node[name]["trials"] for node in found.values()) for name in PARTED} == dict.fromkeys(PARTED, 180)
    inside = [q.scores["f1"] for q in MARKED if q.depth is not None and 0.5 < q.depth <= 0.75]
    assert found["0.75"]["f1"]["value"] == pytest.approx(np.mean(inside), abs=1e-6)


def test_a_bucket_without_questions_is_not_there():
    some = [q for q in MARKED if q.tokens <= 256 and (q.depth is None or q.depth > 0.5)]
    found = by_length(some, name="f1", longest=1000)
    assert list(found) == ["128", "256"] and list(by_depth(some)) == ["0.75", "1.00"]
    unsaid = [q for q in some if q.depth is None]
    assert by_length(unsaid, name="evidence", longest=1000) == by_depth(unsaid) == {}


def test_lengths_become_steps_of_one_metric():
    metrics, words = measured({"longqa_f1": {"extended": by_length(MARKED, name="f1", longest=1000)}})
    assert [m.step for m in metrics if m.key == "longqa_f1/extended"] == list(ENDS)
    assert {m.step for m in metrics if m.key == "longqa_f1/extended/depth/0.50"} <= set(ENDS)
    assert words == []


def test_questions_on_one_source_are_not_independent():
    alike = [replace(q, source="abc"[int(q.scores["f1"] * 3)]) for q in MARKED]
    apart, together = overall(MARKED)["f1"], overall(alike)["f1"]
    assert together["value"] == apart["value"]
    assert together["high"] - together["low"] > 3 * (apart["high"] - apart["low"])
    single = overall([replace(q, source="the only one") for q in MARKED])["f1"]
    assert (single["value"], single["low"], single["high"]) == (apart["value"], None, None)
