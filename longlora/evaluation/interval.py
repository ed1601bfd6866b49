"""Confidence intervals: how far chance alone could have moved a score.

Shares (retrieval accuracy): Clopper and Pearson 1934, exact for the binomial. Means of unequal parts (nats per token over
places of a text): the percentile bootstrap over the parts, seeded.
"""

import numpy as np
from scipy.special import betaincinv

CONFIDENCE = 0.95
DRAWS = 2000


def binomial(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, given `hits` of `trials` (0 < trials). Never narrower than 95 %; includes 0 at 0 hits."""
    assert 0 <= hits <= trials and trials > 0
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return low, high


def bootstrap(sums_N: np.ndarray, *, counts_N: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % interval of sum(sums) / sum(counts) when the N parts are drawn anew, with replacement.

    It speaks of the choice of parts. A single part gives an interval of no width; a part that is not finite gives NaN.
    """
    assert sums_N.shape == counts_N.shape and sums_N.ndim == 1 and len(sums_N) > 0
    chosen_DN = np.random.default_rng(seed).integers(len(sums_N), size=(DRAWS, len(sums_N)))
    means_D = sums_N[chosen_DN].sum(axis=1) / counts_N[chosen_DN].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_D, [tail, 1 - tail])
    return float(low), float(high)
