"""Intervals hold what they promise: exactness against the binomial itself, coverage by simulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from longlora.evaluation.interval import binomial, figure, grouped, of_trials, share


def tail_at_least(hits: int, trials: int, share: float) -> float:
    return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(hits, trials + 1))


@pytest.mark.parametrize(("hits", "trials"), [(1, 7), (3, 8), (19, 20), (40, 41)])
def test_binomial_ends_are_where_each_tail_weighs_two_and_a_half_percent(hits, trials):
    low, high = binomial(hits, trials)
    assert tail_at_least(hits, trials, low) == pytest.approx(0.025, abs=1e-9)
    assert 1 - tail_at_least(hits + 1, trials, high) == pytest.approx(0.025, abs=1e-9)


def test_binomial_reaches_the_edge_at_none_and_all():
    low, high = binomial(0, 8)
    assert (low, round(high, 4)) == (0.0, 0.3694)
    low, high = binomial(8, 8)
    assert (round(low, 4), high) == (0.6306, 1.0)


def test_trials_that_are_right_in_part_are_between_those_that_are_whole():
    assert binomial(3, 8) < binomial(3.5, 8) < binomial(4, 8)


@pytest.mark.parametrize("groups", [4, 12])
@pytest.mark.parametrize("between", [0.0, 0.5])
def test_grouped_covers_the_true_mean_whether_or_not_parts_of_a_group_are_alike(groups, between):
    dice, covered, trials = np.random.default_rng(3), 0, 2000
    group_N = np.repeat(np.arange(groups), 5)
    for _ in range(trials):
        counts = np.full(5 * groups, 7)
        sums = counts * (2.0 + between * dice.normal(size=groups)[group_N] + 0.2 * dice.normal(size=5 * groups))
        low, high = grouped(sums, counts_N=counts, groups_N=list(group_N))
        covered += low <= 2.0 <= high
    assert 0.935 <= covered / trials <= 0.965  # 95 % plus or minus three standard errors


@pytest.mark.parametrize("places", [(19, 1, 1, 1, 1, 1), (9, 6, 3, 3, 2, 1), (22, 1, 1)])
def test_grouped_covers_the_true_mean_though_one_group_has_most_of_the_parts(places):
    dice, covered, trials = np.random.default_rng(4), 0, 2000
    group_N = np.repeat(np.arange(len(places)), places)
    for _ in range(trials):
        sums = 2.0 + dice.normal(size=len(places))[group_N] + dice.normal(size=len(group_N))
        low, high = grouped(sums, counts_N=np.ones(len(group_N)), groups_N=list(group_N))
        covered += low <= 2.0 <= high
    assert (
        covered / trials >= 0.86
    )  # groups so unequal are few; by their distances from the mean it would be half of that


def test_grouped_of_parts_that_are_groups_of_their_own_is_the_t_interval_of_their_mean():
    values = np.random.default_rng(1).normal(size=9)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    ours = grouped(values, counts_N=np.ones(9), groups_N=range(9))
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_grouped_weighs_parts_by_their_counts():
    low, high = grouped(np.array([1.0, 900.0]), counts_N=np.array([1, 300]), groups_N=["a", "b"])
    assert (low + high) / 2 == pytest.approx(901 / 301)


def test_a_group_said_twice_counts_once():
    """Copies of what is known tell nothing new."""
    sums, counts = np.array([6.0, 8.0, 5.0]), np.array([4, 4, 2])
    once = grouped(sums, counts_N=counts, groups_N=[0, 1, 2])
    twice = grouped(np.tile(sums, 2), counts_N=np.tile(counts, 2), groups_N=[0, 1, 2, 0, 1, 2])
    assert twice == pytest.approx(once)


@pytest.mark.parametrize("sums", [[6.0], [6.0, 7.0], [6.0, math.nan]])
def test_one_group_or_a_part_that_is_not_finite_gives_no_interval(sums):
    groups = ["a"] * len(sums) if math.isfinite(sum(sums)) else [*"ab"]
    assert np.isnan(grouped(np.array(sums), counts_N=np.ones(len(sums)), groups_N=groups)).all()


def test_a_share_is_never_surer_than_its_trials_nor_than_its_groups():
    right = np.array([1.0, 1.0, 1.0, 1.0])
    assert share(right, groups_N=[*"abcd"]) == binomial(4, 4)
    halves = np.array([1.0] * 20 + [0.0] * 20)  # one text is easy, one is hard: forty questions are two
    assert share(halves, groups_N=["easy"] * 20 + ["hard"] * 20) == (0.0, 1.0)
    assert np.isnan(share(halves, groups_N=["one"] * 40)).all()  # what is not known of two is not known of one


def test_shares_that_are_all_or_nothing_in_a_group_are_taken_for_surer_than_they_are():
    """What docs/evaluate.md says of it: where no group differs, nothing shows that its trials are alike."""
    dice, covered, trials = np.random.default_rng(6), 0, 1000
    groups = np.repeat(np.arange(4), 20).tolist()
    for _ in range(trials):
        low, high = share(np.repeat((dice.random(4) < 0.8).astype(float), 20), groups_N=groups)
        covered += low <= 0.8 <= high
    assert 0.54 <= covered / trials <= 0.64
    assert "59 times in 100" in (Path(__file__).parent.parent / "docs/evaluate.md").read_text()


def test_a_figure_has_six_digits_null_for_what_is_no_number_and_then_its_counts():
    assert json.dumps(figure(np.float64(1 / 3), (math.nan, math.inf), trials=4, tokens=9)) == (
        '{"value": 0.333333, "low": null, "high": null, "trials": 4, "tokens": 9}'
    )
    assert json.dumps(figure(math.inf, (0, 1))) == '{"value": null, "low": 0.0, "high": 1.0}'


@pytest.mark.parametrize("scores", [[True, False, True], [0.5, 1.0, 0.25]])
def test_trials_give_their_mean_with_the_binomial_interval_and_their_number(scores):
    low, high = binomial(sum(scores), 3)
    known = {"value": round(sum(scores) / 3, 6), "low": round(low, 6), "high": round(high, 6), "trials": 3}
    assert list(of_trials(scores).items()) == list(known.items())
