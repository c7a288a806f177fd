"""The statistics of paired and clustered results. Knows numbers only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 4000


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of so many pairs that changed for the better and for the worse.

    Under the null hypothesis each change is a fair coin; the test is that of McNemar (1947), exact.
    """
    changed = better + worse
    tail: float = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return round(min(1.0, 2 * tail), 4)


def ratio_interval(
    clusters: Sequence[str], numerators: Sequence[float], denominators: Sequence[float], seed: int = 0
) -> tuple[float, float] | None:
    """A 95 % interval of sum(numerators) / sum(denominators), where members of a cluster go together.

    By the percentile bootstrap over clusters, seeded: holes of one file are alike, so that it is files that
    are drawn again. None with fewer than two clusters, or where a sample may have a denominator of 0.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for cluster, numerator, denominator in zip(clusters, numerators, denominators, strict=True):
        sums[cluster][0] += numerator
        sums[cluster][1] += denominator
    table: NDArray[np.float64] = np.array(list(sums.values()))
    if len(table) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(table), (_RESAMPLES, len(table)))
    totals = table[drawn].sum(axis=1)
    totals = totals[totals[:, 1] > 0]
    if not len(totals):
        return None
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)
