"""Grids of tokens on a canvas of tiles: which slot each token takes, and what it is made of.

Every index map of a tiled picture separates into one of its rows and one of its columns: a row or a column
of tokens is a canvas line, or two of them mixed where the grid is resampled. `lines` says which;
`TileCanvas.tokens` crosses rows with columns. What tokens mean, and their order, is in `tiling`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lines", "TileCanvas", "Tokens", "lines"]


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """The rows, or the columns, of a grid of tokens.

    Attributes:
        slots: [n], int64, the canvas line whose slots each takes.
        sources: [n, j], int64, the canvas lines that each is the weighted sum of; j is 1 or 2.
        weights: [n, j], float32, their weights.
    """

    slots: NDArray[np.int64]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """M tokens.

    Attributes:
        slots: [M], int64, the flat slot (tile * N + slot) of each.
        sources: [M, J], int64, the flat encoder tokens (tile * N + patch) that each is the weighted sum of.
        weights: [M, J], float32, their weights.
        places: [M], int64, the place of each in the sequence.
    """

    slots: NDArray[np.int64]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32]
    places: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TileCanvas:
    """Tiles put together, row by row.

    Attributes:
        side: Patches along a side of a tile; N is its square.
        across: Tiles in a row.
        offset: Flat index of the canvas's first patch.
    """

    side: int
    across: int = 1
    offset: int = 0

    def tokens(self, rows: Lines, columns: Lines, places: NDArray[np.int64]) -> Tokens:
        """A grid of R rows and C columns, with their places [R, C]."""
        count, mixed = places.size, rows.sources.shape[1] * columns.sources.shape[1]
        sources = self._row(rows.sources)[:, None, :, None] + self._column(columns.sources)[:, None, :]
        weights = rows.weights[:, None, :, None] * columns.weights[:, None, :]  # both [R, C, j, j]
        return Tokens(
            (self._row(rows.slots)[:, None] + self._column(columns.slots)).reshape(count),
            sources.reshape(count, mixed),
            weights.reshape(count, mixed),
            places.reshape(count),
        )

    # The flat index of the patch in row y and column x is the sum of these two.

    def _row(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.offset + y // self.side * self.across * self.side**2 + y % self.side * self.side

    def _column(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        return x // self.side * self.side**2 + x % self.side


def lines(length: int, number: int, side: int, *, start: int = 0) -> Lines:
    """Rows, or columns, of tokens from a stretch of canvas lines.

    Args:
        length: TileCanvas lines in the stretch.
        number: Lines of tokens: as many, or fewer, which are then interpolated.
        side: TileCanvas lines in a tile.
        start: First canvas line of the stretch.
    """
    if number == length:
        own = start + np.arange(length, dtype=np.int64)
        return Lines(own, own[:, None], np.ones((length, 1), dtype=np.float32))
    index = np.arange(number, dtype=np.int64)
    # The tile that the centre of a line falls in, in whole numbers. Centres are more than one canvas line
    # apart, so that a tile never gets more than `side` of them.
    tile = ((2 * index + 1) * length + 2 * number * start) // (2 * number * side)
    slots = tile * side + index - np.searchsorted(tile, tile)
    # Bilinear as torch computes it (align_corners=False, no antialiasing): the step is a float32, and the
    # coordinate is rounded to one only once, as by a fused multiply-add.
    step = np.float64(np.float32(length) / np.float32(number))
    at = np.maximum(step * (index + 0.5) - 0.5, 0.0).astype(np.float32)
    lower = np.minimum(at.astype(np.int64), length - 1)
    upper = np.minimum(lower + 1, length - 1)
    share = (at - lower).astype(np.float32)
    return Lines(slots, start + np.stack([lower, upper], 1), np.stack([1 - share, share], 1))
