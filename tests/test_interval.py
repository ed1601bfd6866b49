"""Intervals hold what they promise: exactness against the binomial itself, coverage by simulation."""

import math

import numpy as np
import pytest

from longlora.evaluation.interval import binomial, bootstrap


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


def test_bootstrap_covers_the_true_mean_nearly_always():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        counts = generator.integers(5, 50, size=30)
        sums = counts * generator.normal(2.0, 0.5, size=30)
        low, high = bootstrap(sums, counts_N=counts, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 1.0


def test_bootstrap_weighs_parts_by_their_counts():
    low, high = bootstrap(np.array([1.0, 900.0]), counts_N=np.array([1, 300]), seed=0)
    assert (low, high) == (1.0, 3.0)


def test_bootstrap_is_a_function_of_the_seed():
    sums, counts = np.random.default_rng(1).normal(size=11), np.full(11, 2)
    assert bootstrap(sums, counts_N=counts, seed=4) == bootstrap(sums, counts_N=counts, seed=4)
    assert bootstrap(sums, counts_N=counts, seed=4) != bootstrap(sums, counts_N=counts, seed=5)


def test_bootstrap_of_one_part_has_no_width():
    assert bootstrap(np.array([6.0]), counts_N=np.array([4]), seed=0) == (1.5, 1.5)
