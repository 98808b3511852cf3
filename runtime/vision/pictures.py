"""Pictures as the vision encoder takes them, with where their tokens go.

How a picture is shown may depend on how many there are in the conversation (LLaVA-OneVision tiles a single
one, and shows several whole), so pictures are made for a number of them.
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
    """One image, or one video, as the vision encoder takes it.

    Attributes:
        pixels: [T, 3, H, W] float32, of the tiles or of the frames.
        arrangement: Where the tokens of its tiles go; None where an image is one tile and nothing else.
        source: What it was made from, where more pictures would change how it is shown.
        is_video: Whether tiles are frames.
        key: Digest of the pixels and of what becomes of them; two pictures with one key are the same to the
            model.
    """

    pixels: NDArray[np.float32]
    arrangement: Arrangement | None = None
    source: Image.Image | None = None
    is_video: bool = False
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(np.ascontiguousarray(self.pixels).data, digest_size=16)
        if self.arrangement is not None:  # the same pixels may be padding to one picture and not to another
            digest.update(np.ascontiguousarray(self.arrangement.places).data)
        object.__setattr__(self, "key", digest.digest())


@dataclass(frozen=True, slots=True)
class PictureMaker:
    """Makes pictures for one model.

    Attributes:
        processor: Of single tiles.
        tiling: How a picture becomes tiles; None where it is one.
        video: Of single frames; None where the model takes no videos.
    """

    processor: ImageProcessor
    tiling: Tiling | None
    video: ImageProcessor | None = None

    def tiles(self, images: int) -> bool:
        """Whether a picture becomes several tiles where there are so many."""
        return self.tiling is not None and (self.tiling.several == "tiled" or images == 1)

    def add(
        self,
        pictures: Sequence[Picture],
        images: Sequence[Image.Image],
        videos: Sequence[Sequence[Image.Image]] = (),
    ) -> list[Picture]:
        """The pictures of a conversation after some images and videos more.

        Args:
            pictures: Those it has.
            images: New ones, RGB.
            videos: The frames of new ones, RGB; they come after the images.

        Raises:
            InputError: One of them cannot be resized, or the model takes no videos.
        """
        tiled = self.tiles(sum(not picture.is_video for picture in pictures) + len(images))
        earlier = [p if tiled or p.source is None else self._make(p.source, tiled=False) for p in pictures]
        shown = [self._make(image, tiled=tiled) for image in images]
        return [*earlier, *shown, *(self._make_video(frames) for frames in videos)]

    def _make_video(self, frames: Sequence[Image.Image]) -> Picture:
        if self.video is None or self.tiling is None:
            raise InputError("This model takes no videos.", "Give single pictures of it.")
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
