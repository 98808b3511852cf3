"""Rounding to few bits in NumPy: the arithmetic of the quantized graphs, used to measure errors.

Each number format is a small class with the same methods. Weights are [K, N], one column for each output
channel. A scale turns a stored number back into a value: value = scale * stored. Zero is always stored as 0.

    int8    -127 .. 127      one scale for each output channel of a weight, one for an activation
    fp8     E4M3, to 448     the same; 4 exponent and 3 mantissa bits (arXiv 2209.05433)
    blocks  -8 .. 7 or -128 .. 127, one scale for each block of inputs of each output channel; weights only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "Fp8", "Int8", "NumberFormat", "fake_weight", "positive", "relative_error"]

Array = NDArray[np.float32]

_SMALLEST = float(np.finfo(np.float32).tiny)
# Shares of the range that are tried for each block of 4 bits: clipping a few outliers makes finer steps.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


class NumberFormat(Protocol):
    """A format that weights, and perhaps activations, are stored in."""

    @property
    def largest(self) -> float:
        """The largest stored number."""

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the scales of a weight [K, N], in the float type of the graph."""

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """Return the stored numbers of a weight, [K, N]."""

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """Return the scales in a shape that broadcasts to the stored weight [K, N], K being `rows`."""


class _PerChannel:
    """A format with one scale for each output channel."""

    largest: float

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return one scale for each output channel, [N]."""
        return positive(np.abs(weight).max(axis=0) / self.largest, dtype)  # [N]

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """Return the scales as float32, [N]."""
        return scales.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Int8(_PerChannel):
    """8-bit integers. Weights do not use -128, so that negation is exact."""

    largest: float = 127.0

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """Return the stored numbers, [K, N] int8."""
        rounded = np.rint(weight / self.spread(scales, len(weight)))
        stored: NDArray[np.int8] = np.clip(rounded, -127, 127).astype(np.int8)
        return stored

    def activation(self, x: Array, scale: float) -> Array:
        """Return an activation as the graph has it after `QuantizeLinear` and `DequantizeLinear`."""
        rounded: Array = np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
        return rounded


@dataclass(frozen=True, slots=True)
class Fp8(_PerChannel):
    """8-bit floats: E4M3 without infinities."""

    largest: float = 448.0

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """Return the stored numbers, [K, N] float8_e4m3fn."""
        return self._round(weight / self.spread(scales, len(weight)))

    def activation(self, x: Array, scale: float) -> Array:
        """Return an activation as the graph has it after `QuantizeLinear` and `DequantizeLinear`."""
        rounded: Array = self._round(x / np.float32(scale)).astype(np.float32) * np.float32(scale)
        return rounded

    def _round(self, x: Array) -> NDArray[Any]:
        return np.clip(x, -self.largest, self.largest).astype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Integers of 4 or 8 bits, with a scale for each block of inputs.

    Attributes:
        bits: 4 or 8.
        block: Inputs that share a scale; the last block of a column may be shorter.
    """

    bits: int
    block: int

    @property
    def largest(self) -> float:
        """The largest stored number: 7 or 127."""
        return 2.0 ** (self.bits - 1) - 1

    def weight_scales(self, weight: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a scale for each block, [K / block, N]: of a few, the one with the least squared error."""
        blocks = self._blocks(weight)  # [K / block, block, N]
        widest = np.abs(blocks).max(axis=1)
        best = np.full(widest.shape, np.inf, np.float32)
        chosen = np.empty(widest.shape, dtype)
        for shrink in _SHRINKS if self.bits == 4 else (1.0,):
            scales = positive(widest * (shrink / self.largest), dtype)
            step = scales.astype(np.float32)[:, None]
            error = np.square(self._rounded(blocks / step) * step - blocks).sum(axis=1)
            better = error < best
            best[better], chosen[better] = error[better], scales[better]
        return chosen

    def round_weight(self, weight: Array, scales: NDArray[Any]) -> NDArray[Any]:
        """Return the stored numbers, [K, N] int8 with values from -8 to 7 or from -128 to 127."""
        return self._rounded(weight / self.spread(scales, len(weight))).astype(np.int8)

    def spread(self, scales: NDArray[Any], rows: int) -> Array:
        """Return the scale of each number of the weight, [K, N] float32, K being `rows`."""
        return np.repeat(scales.astype(np.float32), self.block, axis=0)[:rows]

    def _blocks(self, weight: Array) -> Array:
        """Return the weight in blocks, padded with zeros: [K / block, block, N]."""
        rows, columns = weight.shape
        padded = np.pad(weight, ((0, -rows % self.block), (0, 0)))
        return padded.reshape(-1, self.block, columns)

    def _rounded(self, x: Array) -> Array:
        rounded: Array = np.clip(np.rint(x), -self.largest - 1, self.largest)
        return rounded


def positive(scales: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return scales in the graph's float type, at least its smallest number: a channel of zeros needs one."""
    smallest = float(np.finfo(dtype).smallest_subnormal) if dtype == np.float16 else _SMALLEST
    return np.maximum(np.asarray(scales, np.float32), smallest).astype(dtype)


def fake_weight(form: NumberFormat, weight: Array, dtype: np.dtype[Any]) -> Array:
    """Return a weight [K, N] after rounding it to a format and back: [K, N] float32."""
    scales = form.weight_scales(weight, dtype)
    stored = form.round_weight(weight, scales).astype(np.float32)
    return stored * form.spread(scales, len(weight))


def relative_error(exact: Array, rounded: Array) -> float:
    """Return the root of the mean over rows [R, N] of |difference|^2 / |exact|^2; every row counts alike.

    Rows of zeros do not count.
    """
    norms = np.square(exact).sum(axis=-1, dtype=np.float64)
    errors = np.square(exact - rounded).sum(axis=-1, dtype=np.float64)
    shares = errors[norms > 0] / norms[norms > 0]
    return float(np.sqrt(shares.mean())) if len(shares) else 0.0
