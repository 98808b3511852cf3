"""95% intervals of figures and of differences. Each assumes that questions are independent of one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap", "paired", "wilson"]

Interval = tuple[float, float]
T = TypeVar("T")

_Z = 1.96
_RESAMPLES = 10_000


def wilson(right: int, of: int, z: float = _Z) -> Interval:
    """Return the score interval of a proportion (Wilson, JASA 22, 1927)."""
    p = right / of
    centre = p + z * z / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return max(0.0, (centre - half) / (1 + z * z / of)), min(1.0, (centre + half) / (1 + z * z / of))


def paired(gained: int, lost: int, of: int, z: float = _Z) -> Interval:
    """Return the interval of the difference of two proportions over the same questions.

    This is the adjusted Wald interval (Bonett and Price, Journal of Educational and Behavioral Statistics
    37, 2012). It adds two questions, one gained and one lost, so that the interval has a width even if no
    answer differs.

    Args:
        gained: Questions right in the second and wrong in the first.
        lost: Questions right in the first and wrong in the second.
        of: All questions.
        z: Quantile of the normal distribution.
    """
    up, down = (gained + 1) / (of + 2), (lost + 1) / (of + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (of + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def bootstrap(
    outcomes: Sequence[T], statistic: Callable[[list[T], NDArray[np.int64]], NDArray[np.float64]]
) -> Interval:
    """Return the percentile interval of a statistic over 10,000 resamples of the questions (fixed seed).

    Args:
        outcomes: One for each question; there are few distinct ones, called kinds.
        statistic: Takes the kinds and how often each was drawn in each resample [R, kinds], and returns the
            statistic of each resample [R].
    """
    kinds = sorted(set(outcomes))  # type: ignore[type-var]
    counts = np.array([outcomes.count(kind) for kind in kinds])
    drawn = np.random.default_rng(0).multinomial(len(outcomes), counts / len(outcomes), size=_RESAMPLES)
    low, high = np.percentile(statistic(kinds, drawn), (2.5, 97.5))
    return float(low), float(high)
