"""Settings by which a model cuts pictures of any size into tiles; a manifest holds them.

`runtime.vision.arrangement` computes the tiles of a picture and the order of its tokens from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from visprune.errors import UsageError

__all__ = ["Tiling"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rules by which a picture of any size becomes square tiles, and its tokens one sequence.

    Attributes:
        pinpoints: Sizes (height, width) in pixels, each a multiple of `tile_size`. A picture is fitted to one
            of them before it is cut. If two fit equally well, the first is used.
        tile_size: Pixels along a side of a tile.
        side: Patches along a side of a tile.
        max_tiles: Features of a picture are resampled to a smaller grid if it has more patches, without those
            of its padding, than about this number of tiles has; None if features are never resampled.
        several: How pictures are treated if a prompt has more than one: "tiled" like a single picture
            (LLaVA-NeXT), or "whole", each padded to a square and one tile (LLaVA-OneVision).
        frame_pooling: Patches along a side of the squares over which the features of a video's frames are
            averaged, before the projector and without a newline (LLaVA-NeXT-Video). None if the projected
            tokens of a frame are resized to half its side, and a newline ends the video (LLaVA-OneVision).

    Raises:
        UsageError: The numbers describe no tiles.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    side: int
    max_tiles: int | None = None
    several: Literal["tiled", "whole"] = "tiled"
    frame_pooling: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.side <= self.tile_size:
            raise UsageError(
                f"A tile of {self.tile_size} x {self.tile_size} pixels cannot have {self.side} x {self.side} "
                "patches.",
                "Give positive numbers, and no more patches than pixels.",
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise UsageError(f"max_tiles is {self.max_tiles}.", "Give a number of at least 1, or None.")
        if self.frame_pooling is not None and not 1 <= self.frame_pooling <= self.side:
            raise UsageError(
                f"Frames of {self.side} x {self.side} patches cannot be pooled over {self.frame_pooling}.",
                f"Give a number from 1 to {self.side}, or None.",
            )
        if not self.pinpoints:
            raise UsageError("There is no pinpoint.", "Give at least one (height, width).")
        for height, width in self.pinpoints:
            if min(height, width) < 1 or height % self.tile_size or width % self.tile_size:
                raise UsageError(
                    f"The pinpoint {height} x {width} is not made of tiles of {self.tile_size} pixels.",
                    f"Give positive multiples of {self.tile_size}.",
                )

    def with_side(self, side: int) -> Tiling:
        """Return the tiling of the same pictures with another number of patches along a side of a tile."""
        pooling = None if self.frame_pooling is None else min(self.frame_pooling, side)
        return replace(self, side=side, frame_pooling=pooling)

    @property
    def resamples(self) -> bool:
        """Whether tokens of large images, or of videos, are mixed from several features each."""
        return self.max_tiles is not None or self.frame_pooling is not None
