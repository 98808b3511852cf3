"""What is said of repeated times, and whether two rows differ at all.

Rows are timed in rounds, each row once a round, so two rows give pairs (a_r, b_r), r = 1 .. R. What slows the
machine for a while slows both of a pair; their ratio is left. The test is the one-sample signed-rank test of
Wilcoxon on d_r = ln(a_r / b_r): exact at ten rounds, without an assumption of normality (times have long
tails to one side), and two or three outliers do not decide it. A bootstrap of ten would claim too much.

Inverted, it gives an interval: with the Walsh averages (d_i + d_j) / 2, i <= j, in order, the ratio is the
exponential of their median (Hodges and Lehmann, 1963), and its 99% interval runs from the k-th smallest to
the k-th largest, k as large as the exact null distribution allows. Two rows are told apart only if that
interval excludes 1, and the ratio is further from 1 than two processes of one bundle may be from each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "FLOOR", "Difference", "Summary", "difference"]

CONFIDENCE = 0.99
"""Of intervals: a table has many pairs, and 95% would find differences in every long one."""

FLOOR = 0.02
"""Where code and data come to lie in memory differs between processes, and changes times by up to so much."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of repetitions, in the unit of the values.

    Attributes:
        median: The middle one.
        p10: A tenth are below.
        p90: A tenth are above.
    """

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value; between two values percentiles are interpolated linearly."""
        low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (10, 50, 90))
        return cls(float(median), float(low), float(high))

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile, as a share of the median; 0 where that is 0."""
        return (self.p90 - self.p10) / self.median if self.median else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """How long one row takes, by how long another does.

    Attributes:
        ratio: Below 1 the first is faster.
        low: Lower end of its 99% interval; None where there are too few rounds for any.
        high: Upper end.
    """

    ratio: float
    low: float | None
    high: float | None

    @property
    def told(self) -> bool:
        """Whether the two can be told apart."""
        if self.low is None or self.high is None or self.low <= 1.0 <= self.high:
            return False
        return abs(math.log(self.ratio)) > math.log1p(FLOOR)

    def inverse(self) -> Difference:
        """The second row by the first."""
        if self.low is None or self.high is None:
            return Difference(1.0 / self.ratio, None, None)
        return Difference(1.0 / self.ratio, 1.0 / self.high, 1.0 / self.low)


def difference(times: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare two rows by their pairs.

    Args:
        times: Of one row, positive, a value a round.
        others: Of another, of the same rounds.
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
    """The largest k with P(T <= k - 1) <= tail, where T is the signed-rank statistic of equal rows."""
    chances = _signed_rank(rounds)
    return int(np.searchsorted(np.cumsum(chances), tail, side="right"))


def _signed_rank(rounds: int) -> NDArray[np.float64]:
    """P(T = t) for t = 0 .. R (R + 1) / 2: each rank is in the sum or not, with equal chances."""
    chances = np.zeros(rounds * (rounds + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, rounds + 1):
        chances[rank:] = chances[rank:] + chances[:-rank]  # the right side is whole before it is assigned
        chances /= 2.0
    return chances
