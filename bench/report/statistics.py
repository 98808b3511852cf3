"""Statistics of repeated times: their summary, and whether two rows differ.

Rows are timed in rounds, each row once a round, so two rows give pairs (a_r, b_r), r = 1 .. R. If the machine
slows down for a while, both times of a pair grow, and their ratio stays. The test is the one-sample
signed-rank test of Wilcoxon on d_r = ln(a_r / b_r). It is exact at ten rounds, it does not assume normality
(times have a long tail on one side), and two or three outliers do not decide it. A bootstrap of ten values
would give intervals that are too narrow.

The interval is the inverse of the test. Of the sorted Walsh averages (d_i + d_j) / 2, i <= j, the exponential
of the median is the ratio (Hodges and Lehmann, 1963). Its 99% interval runs from the k-th smallest to the
k-th largest, with k as large as the exact null distribution allows. Two rows are told apart only if that
interval excludes 1, and if the ratio is further from 1 than two processes of one bundle may be from each
other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "FLOOR", "Difference", "Summary", "difference"]

CONFIDENCE = 0.99
"""Confidence of intervals. A table has many pairs: at 95%, every long table would show false differences."""

FLOOR = 0.02
"""Smallest difference that counts. The layout of code and data in memory differs between processes, and
changes times by up to this share."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of repeated values, in their unit.

    Attributes:
        median: The median.
        p10: The 10th percentile.
        p90: The 90th percentile.
    """

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value; percentiles between two values are interpolated linearly."""
        low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (10, 50, 90))
        return cls(float(median), float(low), float(high))

    @property
    def spread(self) -> float:
        """Distance from the 10th to the 90th percentile, as a share of the median; 0 if the median is 0."""
        return (self.p90 - self.p10) / self.median if self.median else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The time of one row divided by that of another.

    Attributes:
        ratio: Below 1, the first row is faster.
        low: Lower end of its 99% interval; None if there are too few rounds for an interval.
        high: Upper end of the interval, or None.
    """

    ratio: float
    low: float | None
    high: float | None

    @property
    def told(self) -> bool:
        """Whether the two rows can be told apart."""
        if self.low is None or self.high is None or self.low <= 1.0 <= self.high:
            return False
        return abs(math.log(self.ratio)) > math.log1p(FLOOR)

    def inverse(self) -> Difference:
        """Return the second row compared with the first."""
        if self.low is None or self.high is None:
            return Difference(1.0 / self.ratio, None, None)
        return Difference(1.0 / self.ratio, 1.0 / self.high, 1.0 / self.low)


def difference(times: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare two rows by the pairs of each round.

    Args:
        times: Times of one row, positive, one for each round.
        others: Times of the other row, from the same rounds.
    """
    logs = np.log(np.asarray(times, dtype=np.float64) / np.asarray(others, dtype=np.float64))  # [R]
    first, second = np.triu_indices(len(logs))
    walsh = np.sort((logs[first] + logs[second]) / 2)  # [R (R + 1) / 2]
    ratio = math.exp(float(np.median(walsh)))
    outside = _excluded(len(logs), (1.0 - CONFIDENCE) / 2)
    if outside == 0:
        return Difference(ratio, None, None)
    return Difference(ratio, math.exp(float(walsh[outside - 1])), math.exp(float(walsh[-outside])))


def _excluded(rounds: int, tail: float) -> int:
    """Return the largest k with P(T <= k - 1) <= tail, where T is the signed-rank statistic of equal rows."""
    chances = _signed_rank(rounds)
    return int(np.searchsorted(np.cumsum(chances), tail, side="right"))


def _signed_rank(rounds: int) -> NDArray[np.float64]:
    """Return P(T = t) for t = 0 .. R (R + 1) / 2: each rank is in the sum or not, with equal chances."""
    chances = np.zeros(rounds * (rounds + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, rounds + 1):
        # Not in place: the right side reads values that an in-place sum would already have changed.
        chances[rank:] = chances[rank:] + chances[:-rank]
        chances /= 2.0
    return chances
