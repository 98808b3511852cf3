"""Pictures in the form that the vision encoder takes, each with the arrangement of its tokens.

The form of a picture may depend on how many there are in the conversation: LLaVA-OneVision cuts a single
picture into tiles, and shows several whole. So pictures are made for a given number of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError
from visprune.runtime.vision.arrangement import Arrangement, arrange, arrange_video, pixel_values
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.tiling import Tiling

__all__ = ["Picture", "PictureMaker"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image or one video, in the form that the vision encoder takes.

    Attributes:
        pixels: [T, 3, H, W] float32, of the tiles or of the frames.
        arrangement: Places of its tokens in the sequence; None for a model that does not tile.
        source: The original image, if its form would change with more pictures; else None.
        is_video: Whether the tiles are frames.
        key: Digest of the pixels and of the arrangement. Pictures with the same key are the same to the
            model.
    """

    pixels: NDArray[np.float32]
    arrangement: Arrangement | None = None
    source: Image.Image | None = None
    is_video: bool = False
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(np.ascontiguousarray(self.pixels).data, digest_size=16)
        if self.arrangement is not None:  # equal pixels may be padding in one picture and content in another
            digest.update(np.ascontiguousarray(self.arrangement.places).data)
        object.__setattr__(self, "key", digest.digest())


@dataclass(frozen=True, slots=True)
class PictureMaker:
    """Makes pictures for one model.

    Attributes:
        processor: Image processor, which is applied to single tiles.
        tiling: Tiling of the model; None if pictures are not tiled.
        video: Processor of single frames; None if the model takes no videos.
    """

    processor: ImageProcessor
    tiling: Tiling | None
    video: ImageProcessor | None = None

    def tiles(self, images: int) -> bool:
        """Return whether a picture becomes several tiles if a prompt has this number of images."""
        return self.tiling is not None and (self.tiling.several == "tiled" or images == 1)

    def add(
        self,
        pictures: Sequence[Picture],
        images: Sequence[Image.Image],
        videos: Sequence[Sequence[Image.Image]] = (),
    ) -> list[Picture]:
        """Return the pictures of a conversation after images and videos were added to it.

        Args:
            pictures: Pictures that it has already.
            images: New images, RGB.
            videos: Frames of new videos, RGB. Videos come after the images.

        Raises:
            InputError: An image or a frame cannot be resized, or the model takes no videos.
        """
        tiled = self.tiles(sum(not picture.is_video for picture in pictures) + len(images))
        earlier = [p if tiled or p.source is None else self._make(p.source, tiled=False) for p in pictures]
        shown = [self._make(image, tiled=tiled) for image in images]
        return [*earlier, *shown, *(self._make_video(frames) for frames in videos)]

    def _make_video(self, frames: Sequence[Image.Image]) -> Picture:
        if self.video is None or self.tiling is None:
            raise InputError("This model takes no videos.", "Give single frames as pictures.")
        arrangement = arrange_video(len(frames), self.tiling)
        pixels = np.concatenate([self.video(frame) for frame in frames])
        return Picture(pixels, arrangement, is_video=True)

    def _make(self, image: Image.Image, *, tiled: bool) -> Picture:
        if self.tiling is None:
            return Picture(self.processor(image))
        size = (image.height, image.width)
        return Picture(
            pixel_values(image, self.tiling, self.processor, tiled=tiled),
            arrange(size, self.tiling, tiled=tiled),
            image if tiled and self.tiling.several == "whole" else None,
        )
