"""Rounding to few bits, in NumPy: what the graphs compute, and what errors are measured with.

Each number format is a small class with the same functions. Weights are [K, N], one column for each output;
a scale turns a stored number back into a value: value = scale * stored. Zero is always stored as 0.

    int8    -127 .. 127      one scale for each output channel of a weight, one for an activation
    fp8     E4M3, to 448     the same; 4 exponent and 3 mantissa bits (arXiv 2209.05433)
    int4    -8 .. 7          one scale for each block of inputs of each output channel; weights only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["Fp8", "Int4", "Int8", "NumberFormat", "relative_error"]

Array = NDArray[np.float32]

_SMALLEST = float(np.finfo(np.float32).tiny)
# Searched for each block of int4: a few outliers clipped for finer steps elsewhere.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


class NumberFormat(Protocol):
    """How weights, and maybe activations, are stored."""

    @property
    def largest(self) -> float:
        """The largest number."""

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Scales of a weight [K, N] in the float type of the graph."""

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """A weight as it is stored, [K, N]."""

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """Scales as they multiply a stored weight: broadcastable to [K, N], K being `rows`."""


class _PerChannel:
    """One scale for each output channel."""

    largest: float

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """[N]."""
        return positive(np.abs(weight).max(axis=0) / self.largest, dtype)  # [N]

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """[N] or [K, N]."""
        return scales.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Int8(_PerChannel):
    """Integers; -128 is not used, so that negation is exact."""

    largest: float = 127.0

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """[K, N]."""
        rounded = np.rint(weight / self.spread(scales, len(weight)))
        stored: NDArray[np.int8] = np.clip(rounded, -127, 127).astype(np.int8)
        return stored

    def activation(self, x: Array, scale: float) -> Array:
        """X as the graph sees it, after `QuantizeLinear` and `DequantizeLinear`."""
        rounded: Array = np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
        return rounded


@dataclass(frozen=True, slots=True)
class Fp8(_PerChannel):
    """E4M3 without infinities."""

    largest: float = 448.0

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """[K, N]."""
        return self._round(weight / self.spread(scales, len(weight)))

    def activation(self, x: Array, scale: float) -> Array:
        """X as the graph sees it."""
        rounded: Array = self._round(x / np.float32(scale)).astype(np.float32) * np.float32(scale)
        return rounded

    def _round(self, x: Array) -> NDArray[Any]:
        return np.clip(x, -self.largest, self.largest).astype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Int4:
    """Four bits, in blocks along K.

    Attributes:
        block: Inputs that share a scale; the last block of a column may be shorter.
    """

    block: int
    largest: float = 7.0

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """[K / block, N]. Of a few scales for each block the one with the least squared error."""
        blocks = self._blocks(weight)  # [K / block, block, N]
        widest = np.abs(blocks).max(axis=1)
        best = np.full(widest.shape, np.inf, np.float32)
        chosen = np.empty(widest.shape, dtype)
        for shrink in _SHRINKS:
            scales = positive(widest * (shrink / self.largest), dtype)
            step = scales.astype(np.float32)[:, None]
            error = np.square(_to_int4(blocks / step) * step - blocks).sum(axis=1)
            better = error < best
            best[better], chosen[better] = error[better], scales[better]
        return chosen

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """[K, N]."""
        return _to_int4(weight / self.spread(scales, len(weight))).astype(np.int8)

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """[N] or [K, N]."""
        return np.repeat(scales.astype(np.float32), self.block, axis=0)[:rows]

    def _blocks(self, weight: Array) -> Array:
        rows, columns = weight.shape
        padded = np.pad(weight, ((0, -rows % self.block), (0, 0)))
        return padded.reshape(-1, self.block, columns)


def _to_int4(x: Array) -> Array:
    rounded: Array = np.clip(np.rint(x), -8, 7)
    return rounded


def positive(scales: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales in the graph's float type; a channel of zeros has one too."""
    smallest = float(np.finfo(dtype).smallest_subnormal) if dtype == np.float16 else _SMALLEST
    return np.maximum(np.asarray(scales, np.float32), smallest).astype(dtype)


def fake_weight(form: NumberFormat, weight: Array, dtype: np.dtype[Any]) -> Array:
    """A weight after storing and reading it: [K, N] float32."""
    scales = form.weight_scales(weight, dtype)
    stored = form.round_weight(weight, scales).astype(np.float32)
    return stored * form.spread(scales, len(weight))


def relative_error(exact: Array, rounded: Array) -> float:
    """Root of the mean over rows [R, N] of |difference|^2 / |exact|^2: every token counts alike."""
    norms = np.square(exact).sum(axis=-1, dtype=np.float64)
    errors = np.square(exact - rounded).sum(axis=-1, dtype=np.float64)
    shares = errors[norms > 0] / norms[norms > 0]
    return float(np.sqrt(shares.mean())) if len(shares) else 0.0
