"""Grids of tokens on a canvas of tiles: the slot of each token, and the encoder tokens that it is made of.

Every index map of a tiled image separates into one for its rows and one for its columns. A row or a column
of tokens is one line of the canvas, or a mix of several if the grid is resampled. `lines` and
`averaged_lines` compute these; `TileCanvas.tokens` combines rows with columns. `arrangement` decides the
order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lines", "TileCanvas", "Tokens", "averaged_lines", "lines"]


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """The n rows, or the n columns, of a grid of tokens.

    Attributes:
        slots: [n], int64, for each row the canvas line whose slots its tokens take.
        sources: [n, j], int64, the canvas lines of whose weighted sum each row is made; j is 1 or 2, or the
            edge of the squares that are averaged.
        weights: [n, j], float32, their weights.
    """

    slots: NDArray[np.int64]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """M tokens.

    Attributes:
        slots: [M], int64, flat slot (tile * N + slot) of each token.
        sources: [M, J], int64, flat encoder tokens (tile * N + patch) of whose weighted sum each is made.
        weights: [M, J], float32, their weights.
        places: [M], int64, place of each token in the sequence.
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
        across: Number of tiles in a row.
        offset: Flat index of the canvas's first patch.
    """

    side: int
    across: int = 1
    offset: int = 0

    def tokens(self, rows: Lines, columns: Lines, places: NDArray[np.int64]) -> Tokens:
        """Return the tokens of a grid of R rows and C columns, with their places [R, C]."""
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
    """Make rows, or columns, of tokens from consecutive canvas lines.

    Args:
        length: Number of canvas lines.
        number: Number of rows of tokens: the same, or fewer, which are then interpolated.
        side: Canvas lines in a tile.
        start: First canvas line.
    """
    if number == length:
        own = start + np.arange(length, dtype=np.int64)
        return Lines(own, own[:, None], np.ones((length, 1), dtype=np.float32))
    index = np.arange(number, dtype=np.int64)
    # The tile that contains the centre of each line, computed in whole numbers. Centres are more than one
    # canvas line apart, so a tile never gets more than `side` of them.
    tile = ((2 * index + 1) * length + 2 * number * start) // (2 * number * side)
    slots = tile * side + index - np.searchsorted(tile, tile)
    # Bilinear as torch computes it (align_corners=False, no antialiasing): the step is a float32, and the
    # coordinate is rounded to float32 only once, as by a fused multiply-add.
    step = np.float64(np.float32(length) / np.float32(number))
    at = np.maximum(step * (index + 0.5) - 0.5, 0.0).astype(np.float32)
    lower = np.minimum(at.astype(np.int64), length - 1)
    upper = np.minimum(lower + 1, length - 1)
    share = (at - lower).astype(np.float32)
    return Lines(slots, start + np.stack([lower, upper], 1), np.stack([1 - share, share], 1))


def averaged_lines(side: int, edge: int) -> Lines:
    """Make rows, or columns, of tokens that are means over squares of one tile; a rest of lines is left out.

    Args:
        side: Lines of the tile.
        edge: Lines that make one row of tokens.
    """
    slots = np.arange(side // edge, dtype=np.int64)
    sources = slots[:, None] * edge + np.arange(edge, dtype=np.int64)
    return Lines(slots, sources, np.full(sources.shape, 1 / edge, dtype=np.float32))
