"""Resampling of a vision tower's table of positions, for images that are made smaller before the tower.

It computes what the towers of transformers do with `interpolate_pos_encoding`: bicubic interpolation without
antialiasing (Keys, a = -0.75, edges repeated), written as two matrix products, whose factors are computed
from the number of patches. So a graph takes images of any size, with operators that every backend has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["resampled_positions"]

_A = -0.75


def resampled_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Return the positions of a grid of patches: [N, Dv] -> [rows * columns, Dv], in the table's dtype.

    For the table's own grid the result is the table.

    Args:
        table: Positions of a square grid, row by row.
        rows: Rows of the grid; may be symbolic.
        columns: Its columns.
    """
    side, width = math.isqrt(table.shape[0]), table.shape[1]
    by_row = _weights(rows, side) @ table.float().reshape(side, side * width)  # [rows, side * Dv]
    grid = _weights(columns, side) @ by_row.reshape(-1, side, width)  # [rows, columns, Dv]
    return grid.reshape(-1, width).to(table.dtype)


def _weights(length: int, whole: int) -> Tensor:
    """Return the weight of each of the `whole` old lines in each of the `length` new ones."""
    # A new line i is at (i + 1/2) whole / length - 1/2 of the old ones. Whole numbers give the exact place.
    twice = 2 * torch.full((1,), length, dtype=torch.float32)
    at = (2 * torch.arange(length).float() + 1) * whole - twice / 2
    lower = (at / twice).floor()
    beyond = (at - lower * twice) / twice  # in [0, 1)
    old = torch.arange(whole).float()
    weights = torch.zeros(1, whole)
    taps = (_outer(beyond + 1), _inner(beyond), _inner(1 - beyond), _outer(2 - beyond))
    for offset, weight in zip((-1, 0, 1, 2), taps, strict=True):
        line = (lower + offset).clamp(0, whole - 1)
        weights = weights + weight.unsqueeze(1) * (line.unsqueeze(1) == old).float()
    return weights


def _inner(x: Tensor) -> Tensor:
    """Return the cubic convolution kernel for a distance of at most 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _outer(x: Tensor) -> Tensor:
    """Return the cubic convolution kernel for a distance from 1 to 2."""
    return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
