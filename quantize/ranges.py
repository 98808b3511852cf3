"""The range of an activation, from a sample of its values.

    max         the largest magnitude there was
    percentile  what 99.99% of the values stay below
    entropy     where the quantized histogram tells least apart from the original: least Kullback-Leibler
                divergence (S. Migacz, "8-bit inference with TensorRT", GTC 2017)
    search      of all these, and of a lower percentile, the one with which a layer's output changes least

Values beyond a range are clipped to it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["RANGES", "Range", "candidates", "entropy_range"]

Range = Literal["search", "max", "percentile", "entropy"]
RANGES: tuple[Range, ...] = ("search", "max", "percentile", "entropy")

Array = NDArray[np.float32]

_BINS = 2048
_PERCENTILES = (99.99, 99.9)
_LEVELS = 128  # magnitudes of int8


def candidates(kind: Range, rows: Array, amax: float) -> list[float]:
    """Ranges to choose from, each a positive magnitude.

    Args:
        kind: How ranges are found.
        rows: Values of the activation, [R, K].
        amax: Its largest magnitude over all values, sampled or not.
    """
    magnitudes = np.abs(rows)
    found = {
        "max": [amax],
        "percentile": [float(np.percentile(magnitudes, _PERCENTILES[0]))],
        "entropy": [entropy_range(magnitudes, amax)] if kind in ("entropy", "search") else [],
    }
    found["search"] = [
        *found["max"],
        *(float(np.percentile(magnitudes, percent)) for percent in _PERCENTILES),
        *found["entropy"],
    ]
    return sorted({value for value in found[kind] if value > 0.0} or {amax}, reverse=True)


def entropy_range(magnitudes: Array, amax: float, bins: int = _BINS) -> float:
    """The range with the least divergence between the values and their quantized histogram.

    Args:
        magnitudes: Absolute values.
        amax: The largest of all.
        bins: Of the histogram.
    """
    counts, edges = np.histogram(magnitudes, bins=bins, range=(0.0, amax))
    counts = counts.astype(np.float64)
    counts[0] = 0.0  # zeros are exact in any range
    if not counts.any():
        return amax
    best, chosen = np.inf, bins
    for stop in range(_LEVELS, bins + 1, 16):
        clipped = counts[:stop].copy()
        clipped[-1] += counts[stop:].sum()
        divergence = _divergence(clipped, _quantized(counts[:stop]))
        if divergence < best:
            best, chosen = divergence, stop
    return float(edges[chosen])


def _quantized(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bins share `_LEVELS` levels: the count of each, spread over those of its bins that have any."""
    levels = np.arange(len(counts)) * _LEVELS // len(counts)
    filled = counts > 0
    total = np.bincount(levels, counts, _LEVELS)
    share = total / np.maximum(np.bincount(levels, filled, _LEVELS), 1)
    return np.where(filled, share[levels], 0.0)


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence of two histograms; bins that q has lost count as nearly empty."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())
