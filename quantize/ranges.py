"""The range of an activation, found from a sample of its values.

    max         the largest magnitude
    percentile  the magnitude that 99.99% of the values stay below
    entropy     the range whose quantized histogram has the least Kullback-Leibler divergence from the
                original one (S. Migacz, "8-bit inference with TensorRT", GTC 2017)
    search      of all these and the 99.9th percentile, the one that changes the outputs of the layers least

Values beyond a range are clipped to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from visprune.quantize.quantize_options import RANGES, Range

__all__ = ["RANGES", "Range", "candidates", "entropy_range"]

Array = NDArray[np.float32]

_BINS = 2048
_PERCENTILES = (99.99, 99.9)
_LEVELS = 128  # magnitudes that int8 can store


def candidates(kind: Range, rows: Array, amax: float) -> list[float]:
    """Return the ranges to choose from, each a positive magnitude, the largest first.

    Args:
        kind: How ranges are found; see the module's docstring.
        rows: Sampled values of the activation, [R, K].
        amax: The largest magnitude of all its values, sampled or not.
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
    """Return the range with the least divergence between the histogram of the values and the quantized one.

    Args:
        magnitudes: Absolute values of the activation, of any shape.
        amax: The largest magnitude of all.
        bins: Number of bins of the histogram.
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
    """Return a histogram quantized to `_LEVELS` levels.

    The count of each level is spread evenly over those of its bins that are not empty.
    """
    levels = np.arange(len(counts)) * _LEVELS // len(counts)
    filled = counts > 0
    total = np.bincount(levels, counts, _LEVELS)
    share = total / np.maximum(np.bincount(levels, filled, _LEVELS), 1)
    return np.where(filled, share[levels], 0.0)


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return the Kullback-Leibler divergence of two histograms; empty bins of q count as nearly empty."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())
