"""What dvc.yaml declares for us: a slip in a key or value is one line that names it, and no other meaning."""

import re

import pytest

from tasks.beside import beside_of
from tasks.comparison import Better, comparisons_of
from tasks.declared import Artifact, TaskOptions, declared

KEYS = "metric, order, no_worse_than, step, data, params"


def model(**meta: object) -> Artifact:
    return Artifact("dummy", "models/tuned", "model", "", [], meta)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"metric": "m", "order": "higer"}, "order = 'higer': Input should be 'lower' or 'higher'"),
        ({"metric": "m", "ordre": "lower"}, f"unknown key 'ordre'; there are: {KEYS}"),
        ({"order": "lower"}, f"lacks metric; there are: {KEYS}"),
        (
            {"metric": "m", "order": "lower", "no_worse_than": "0.1"},
            "no_worse_than = '0.1': Input should be a valid number",
        ),
        ("m", f"must be {{key: value}}, of {KEYS}; not 'm'"),
    ],
)
def test_a_slip_in_what_a_champion_must_win_by_is_named_and_turns_no_comparison(entry, said):
    with pytest.raises(ValueError, match=f"^{re.escape(f'dvc.yaml: artifacts: dummy: meta: better: {said}')}$"):
        comparisons_of(model(better=[entry]))


def test_one_comparison_may_stand_without_a_list():
    assert comparisons_of(model(better={"metric": "m", "order": "lower", "no_worse_than": 0})) == [
        Better("m", "lower", 0)
    ]


def test_a_slip_in_where_a_champion_stands_beside_is_named():
    with pytest.raises(
        ValueError, match="^dvc.yaml: artifacts: dummy: meta: beside: lacks folder; there are: list, folder$"
    ):
        beside_of(model(beside={"list": "rivals.models"}))


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"retires": 2}, "unknown key 'retires'; there are: retries, retry_delay_seconds, "),
        ({"retries": "two"}, "retries = 'two': Input should be a valid integer"),
        ({"tags": "gpu"}, "tags = 'gpu': Input should be a valid list"),
    ],
)
def test_a_slip_in_a_stages_options_is_named(meta, said):
    with pytest.raises(ValueError, match=f"^dvc.yaml: stages: train: meta: {said}"):
        declared(TaskOptions, meta, at="stages: train: meta")
    declared(TaskOptions, {"retries": 2, "retry_delay_seconds": [1, 2.5], "tags": ["gpu"]}, at="stages: train: meta")
