"""Pictures in the form that the vision encoder takes, each with the arrangement of its tokens.

The form of a picture may depend on how many there are in the conversation: LLaVA-OneVision cuts a single
picture into tiles, and shows several whole. So pictures are made for a given number of them. Where the method
makes the grid of tokens smaller, it also depends on how many tokens are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError
from visprune.manifest import Pruning
from visprune.runtime.vision.arrangement import Arrangement, arrange, arrange_video, views
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.runtime.vision.sources import Video
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
        question: Tokens of the text that it came with, if the method before the LLM reads them.
        visual_tokens: Visual tokens before pruning; None for a model that does not tile.
        key: Digest of all that the model sees of it. Pictures with the same key are the same to the model.
    """

    pixels: NDArray[np.float32]
    arrangement: Arrangement | None = None
    source: Image.Image | None = None
    is_video: bool = False
    question: tuple[int, ...] = ()
    visual_tokens: int | None = None
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(np.ascontiguousarray(self.pixels).data, digest_size=16)
        if self.arrangement is not None:  # equal pixels may be padding in one picture and content in another
            digest.update(np.ascontiguousarray(self.arrangement.places).data)
        digest.update(np.array(self.question, dtype=np.int64).data)
        object.__setattr__(self, "key", digest.digest())


@dataclass(frozen=True, slots=True)
class PictureMaker:
    """Makes pictures for one model.

    Attributes:
        processor: Image processor, which is applied to single tiles.
        tiling: Tiling of the model; None if pictures are not tiled.
        video: Processor of single frames; None if the model takes no videos.
        arranged: Tiling by which tokens are arranged: the model's own, unless the method makes the grid of a
            tile smaller.
        edge: Pixels along a side to which each tile is shrunk before the vision tower; None for its own size.
    """

    processor: ImageProcessor
    tiling: Tiling | None
    video: ImageProcessor | None = None
    arranged: Tiling | None = None
    edge: int | None = None

    def __post_init__(self) -> None:
        if self.arranged is None:
            object.__setattr__(self, "arranged", self.tiling)

    def for_tokens(self, pruning: Pruning, keep_tokens: int) -> PictureMaker:
        """Return the maker of pictures of which so many tokens of each tile are kept.

        It is another one only where the method makes the grid of tokens smaller.

        Args:
            pruning: The manifest's `pruning`.
            keep_tokens: K.
        """
        arranged, edge = pruning.arranged(self.tiling, keep_tokens), pruning.smaller_image(keep_tokens)
        return replace(self, arranged=arranged, edge=edge)

    def resized_tokens(self, pruning: Pruning, image: Image.Image, kept: int, images: int) -> int:
        """Return K for an image that was made smaller and has so many kept tokens; else the bundle's own K.

        Args:
            pruning: The manifest's `pruning`.
            image: The image, RGB.
            kept: Its tokens, of all tiles.
            images: Number of images in its prompt.
        """
        size, tiled = (image.height, image.width), self.tiles(images)
        for side in range(1, math.isqrt(pruning.budget.visual_tokens) + 1):
            count, arranged = side * side, pruning.arranged(self.tiling, side * side)
            with contextlib.suppress(InputError):  # it may be too elongated for so few tokens
                tokens = arrange(size, arranged, tiled=tiled).visual_tokens if arranged else count
                if tokens == kept:
                    return count
        return pruning.keep_tokens

    def tiles(self, images: int) -> bool:
        """Return whether a picture becomes several tiles if a prompt has this number of images."""
        return self.tiling is not None and (self.tiling.several == "tiled" or images == 1)

    def make(
        self,
        shown: Sequence[Image.Image | Video | Picture],
        questions: Sequence[tuple[int, ...]] = (),
    ) -> list[Picture]:
        """Return the pictures of a conversation.

        Args:
            shown: Its images (RGB), its videos, and pictures that were made for an earlier turn, in order.
            questions: For each of them the tokens of the text that it came with; none if left out. A picture
                keeps its own.

        Raises:
            InputError: An image or a frame cannot be resized, or the model takes no videos.
        """
        videos = [isinstance(one, Video) or (isinstance(one, Picture) and one.is_video) for one in shown]
        tiled = self.tiles(videos.count(False))
        return [
            self._make(one, question, tiled=tiled)
            for one, question in zip(shown, questions or [()] * len(shown), strict=True)
        ]

    def seen(self, view: Image.Image) -> Image.Image:
        """Return a view, as `ImageProcessor.crop` gives it, at the size that the vision tower gets it."""
        return view if self.edge is None else self.processor.resized(view, (self.edge, self.edge))

    def _make(
        self, shown: Image.Image | Video | Picture, question: tuple[int, ...], *, tiled: bool
    ) -> Picture:
        if isinstance(shown, Video):
            return self._make_video([decode(frame) for frame in shown.frames], question)
        if isinstance(shown, Image.Image):
            return self._make_image(shown, question, tiled=tiled)
        if tiled or shown.source is None:
            return shown
        return self._make_image(shown.source, shown.question, tiled=False)

    def _make_video(self, frames: Sequence[Image.Image], question: tuple[int, ...]) -> Picture:
        if self.video is None or self.tiling is None or self.arranged is None:
            raise InputError("This model takes no videos.", "Give single frames as pictures.")
        arrangement, whole = (arrange_video(len(frames), one) for one in (self.arranged, self.tiling))
        pixels = self.video.tensor([self.seen(self.video.crop(frame)) for frame in frames])
        count = whole.visual_tokens
        return Picture(pixels, arrangement, is_video=True, question=question, visual_tokens=count)

    def _make_image(self, image: Image.Image, question: tuple[int, ...], *, tiled: bool) -> Picture:
        if self.tiling is None or self.arranged is None:
            view = self.seen(self.processor.crop(image))
            return Picture(self.processor.tensor([view]), question=question)
        size = (image.height, image.width)
        shown = views(image, self.tiling, self.processor, tiled=tiled)
        return Picture(
            self.processor.tensor([self.seen(view) for view in shown]),
            arrange(size, self.arranged, tiled=tiled),
            image if tiled and self.tiling.several == "whole" else None,
            question=question,
            visual_tokens=arrange(size, self.tiling, tiled=tiled).visual_tokens,
        )
