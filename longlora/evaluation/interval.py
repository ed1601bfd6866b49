"""95 % confidence intervals: how far chance alone could have moved a score; and the score with its interval, as files hold it.

Shares of independent trials (a key found or not): Clopper and Pearson 1934, exact for the binomial. Means of parts that come in
groups (places of a document, questions on one): by the spread between the groups, with Student's t, for what one document has more
of, its other places have too, and to count them all would make an interval too narrow (Cameron and Miller 2015, A Practitioner's
Guide to Cluster-Robust Inference). The spread is that of the means without one group each (the jackknife, CV3 of MacKinnon, Nielsen
and Webb 2023): by each group's distance from the mean, a group that has most of the parts would seem near it, for it makes the
mean. A single group says nothing of the spread, so it gives no interval (NaN).

Letters: N parts, G groups.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2


def figure(value: float, ends: tuple[float, float], **counts: int) -> dict[str, Any]:
    """A score with the ends of its interval, and what it was counted over: to six digits, null where it is not finite (JSON has
    no NaN)."""
    numbers = zip(("value", "low", "high"), (value, *ends), strict=True)
    return {name: round(float(n), 6) if math.isfinite(n) else None for name, n in numbers} | counts


def of_trials(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of independent trials, each from 0 to 1, as a figure."""
    return figure(sum(scores) / len(scores), binomial(sum(scores), len(scores)), trials=len(scores))


def binomial(hits: float, trials: int) -> tuple[float, float]:
    """The interval of a share, given `hits` of `trials` (0 < trials). Never narrower than 95 %; includes 0 at 0 hits.

    Trials may be right in part: of all scores in [0, 1] with one mean, those of 0 and 1 spread most.
    """
    assert 0 <= hits <= trials and trials > 0
    low = float(betaincinv(hits, trials - hits + 1, TAIL)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - TAIL)) if hits < trials else 1.0
    return low, high


def grouped(sums_N: np.ndarray, *, counts_N: np.ndarray, groups_N: Sequence[Hashable]) -> tuple[float, float]:
    """The interval of sum(sums) / sum(counts), where only parts of different groups are independent.

    NaN for a single group, and where a part is not finite.
    """
    assert sums_N.shape == counts_N.shape == (len(groups_N),) and len(groups_N) > 0
    mean = sums_N.sum() / counts_N.sum()
    group_N = np.unique([str(group) for group in groups_N], return_inverse=True)[1]
    groups = int(group_N.max()) + 1
    if groups < 2 or not np.isfinite(mean):
        return float("nan"), float("nan")
    sums_G, counts_G = (np.bincount(group_N, weights=parts_N) for parts_N in (sums_N, counts_N))
    without_G = (sums_N.sum() - sums_G) / (counts_N.sum() - counts_G)
    error = np.sqrt((groups - 1) / groups * ((without_G - mean) ** 2).sum())
    reach = float(stdtrit(groups - 1, 1 - TAIL)) * error
    return float(mean - reach), float(mean + reach)


def share(scores_N: np.ndarray, *, groups_N: Sequence[Hashable]) -> tuple[float, float]:
    """The interval of the mean of scores in [0, 1]: the wider of what the trials alone allow, and what the groups show. NaN for a
    single group: forty questions on one document are not surer than twenty on each of two."""
    low, high = binomial(float(scores_N.sum()), len(scores_N))
    between = grouped(scores_N, counts_N=np.ones(len(scores_N)), groups_N=groups_N)
    if np.isnan(between).any():
        return between
    return max(0.0, min(low, between[0])), min(1.0, max(high, between[1]))
