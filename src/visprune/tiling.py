"""How a model cuts pictures of any size into tiles: the settings, which a manifest holds.

What follows from them, the tiles of a picture and the order of its tokens, is in `runtime.tiling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["Tiling"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a picture of any size becomes square tiles, and its tokens one sequence.

    Attributes:
        pinpoints: Sizes (height, width), in pixels, to one of which a picture is fitted before it is cut;
            each a multiple of `tile_size`. Where two fit a picture equally well, the first is taken.
        tile_size: Pixels along a side of a tile.
        side: Patches along a side of a tile.
        max_tiles: Where the patches of a picture, without those of its padding, are more than about so many
            tiles have, its features are resampled to a smaller grid; None: never.
        several: What pictures are where a prompt has more than one: tiled like a single one (LLaVA-NeXT), or
            each padded to a square and one tile (LLaVA-OneVision).

    Raises:
        UsageError: The numbers describe no tiles.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    side: int
    max_tiles: int | None = None
    several: Literal["tiled", "whole"] = "tiled"

    def __post_init__(self) -> None:
        if not 1 <= self.side <= self.tile_size:
            raise UsageError(
                f"A tile of {self.tile_size} x {self.tile_size} pixels cannot have {self.side} x {self.side} "
                "patches.",
                "Give positive numbers, and no more patches than pixels.",
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise UsageError(f"max_tiles is {self.max_tiles}.", "Give a number of at least 1, or None.")
        if not self.pinpoints:
            raise UsageError("There is no pinpoint.", "Give at least one (height, width).")
        for height, width in self.pinpoints:
            if min(height, width) < 1 or height % self.tile_size or width % self.tile_size:
                raise UsageError(
                    f"The pinpoint {height} x {width} is not made of tiles of {self.tile_size} pixels.",
                    f"Give positive multiples of {self.tile_size}.",
                )
