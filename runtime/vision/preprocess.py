"""Preprocessing: makes the vision tower's tensor of an image, as the checkpoint's own processor does.

It reproduces the Pillow-based image processors of transformers (CLIP, SigLIP, LLaVA) bit for bit, from the
checkpoint's `preprocessor_config.json`. All steps up to the crop work on 8-bit pixels, so rescaling and
normalising are one table of 256 values for each channel. `images` decodes files, `processor_config` reads the
configuration, and `arrangement` cuts an image into tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError, UnsupportedError
from visprune.runtime.vision.processor_config import ProcessorSettings, unsupported

__all__ = ["MAX_EDGE", "MAX_RESIZED_PIXELS", "ImageProcessor"]

MAX_EDGE = 2**20
"""Longest edge of an image that is resized, in pixels: Pillow's tables take 32 bytes for each of them."""

MAX_RESIZED_PIXELS = 2**28
"""Largest intermediate image, in pixels: a thin strip whose short edge is enlarged can become huge."""


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Pads, resizes, crops, rescales and normalises one image, in this order.

    Attributes:
        pad_colour: RGB colour of the padding that first makes an image square; None for no padding.
        resize: Shortest edge after resizing, or (height, width); None for no resizing.
        resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        crop_size: (height, width) of the centre crop; None for no crop. A smaller image is surrounded by
            black *before* rescaling and normalising.
        rescale_factor: Factor of the 8-bit values; 1.0 for no rescaling.
        mean: Subtracted from each channel after rescaling; zeros for no normalising.
        std: Divisor of each channel after that; ones for no normalising.

    Raises:
        UnsupportedError: A setting is out of range, or the tensors would vary in size.
    """

    pad_colour: tuple[int, int, int] | None
    resize: int | tuple[int, int] | None
    resample: int
    crop_size: tuple[int, int] | None
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    _table: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        edges = (self.resize,) if isinstance(self.resize, int) else self.resize or ()
        height, width = self.output_size
        if min((height, width, *edges)) <= 0 or max(height * width, *edges, 0) > MAX_RESIZED_PIXELS:
            raise unsupported("size and crop_size", (self.resize, self.crop_size))
        if self.resample not in list(Image.Resampling):
            raise unsupported("resample", self.resample)
        if 0.0 in self.std or not all(isfinite(v) for v in (*self.mean, *self.std, self.rescale_factor)):
            raise unsupported("image_mean and image_std", (self.mean, self.std))
        if self.pad_colour and not all(0 <= level <= 255 for level in self.pad_colour):
            raise unsupported("do_pad with a colour", self.pad_colour)
        # The dtypes and the order are those of transformers, so that all 256 values are equal bit for bit.
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))  # [3, 1]
        object.__setattr__(self, "_table", (levels - mean) / std)  # [3, 256]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of every tensor. Settings with which they would vary are refused."""
        if self.crop_size:
            return self.crop_size
        if isinstance(self.resize, tuple):
            return self.resize
        if self.pad_colour and self.resize:  # both edges of a square are its shortest edge
            return (self.resize, self.resize)
        raise UnsupportedError(
            "The image processor neither crops nor resizes to a fixed size, so tensors would vary in size.",
            "Set do_center_crop and crop_size, or a size with height and width, in preprocessor_config.json.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ImageProcessor:
        """Read the configuration of a CLIP, SigLIP or LLaVA image processor.

        Every variant of the class name (`...Fast`, `...Pil`, the old `...FeatureExtractor`) means the Pillow
        processor. Keys that the classes ignore are ignored here too. For classes that tile, the result
        processes one tile, or an image that is not tiled; for a video processor, one frame. transformers has
        the video processor only for torchvision, whose bicubic filter rounds some values of a frame to other
        levels than Pillow's.

        Args:
            config: Content of `preprocessor_config.json`, or of the newer `processor_config.json`, which has
                the same under the key `image_processor`.

        Raises:
            UnsupportedError: The class or a setting is not supported.
        """
        settings = ProcessorSettings.from_config(config)
        defaults = settings.defaults
        do_pad = settings.flag("do_pad", False)
        if do_pad and defaults.squares == "never":
            raise unsupported(f"do_pad (of a {settings.name})", True)
        if settings.flag("use_square_size", False):
            raise unsupported("use_square_size", True)
        tiles = defaults.squares == "always"
        mean = settings.channels("image_mean", defaults.mean)
        # int() truncates, as in transformers; rounding would make the colour one level brighter
        colour = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
        normalises = settings.flag("do_normalize", True)
        crops = settings.flag("do_center_crop", defaults.crop_size is not None)
        if crops and settings.crop_size() is None:
            raise unsupported("crop_size", None)
        processor = cls(
            pad_colour=colour if do_pad or tiles else None,
            resize=settings.size() if settings.flag("do_resize", True) else None,
            resample=settings.integer("resample", Image.Resampling.BICUBIC),
            crop_size=settings.crop_size() if crops else None,
            rescale_factor=(
                settings.number("rescale_factor", 1 / 255) if settings.flag("do_rescale", True) else 1.0
            ),
            mean=mean if normalises else (0.0, 0.0, 0.0),
            std=settings.channels("image_std", defaults.std) if normalises else (1.0, 1.0, 1.0),
        )
        if tiles:
            _check_tiles(processor, settings.crop_size())
        return processor

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Make the `pixel_values` of one image.

        Args:
            image: RGB, as `images.decode` gives it.

        Returns:
            Tensor [1, 3, H, W], float32, equal bit for bit to the Pillow processor of transformers.

        Raises:
            InputError: As for `crop`.
        """
        return self.tensor([self.crop(image)])

    def tensor(self, views: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Rescale and normalise images.

        Args:
            views: T images of one size, 8-bit RGB, as `crop` gives them.

        Returns:
            Tensor [T, 3, H, W], float32.
        """
        out = np.empty((len(views), 3, views[0].height, views[0].width), dtype=np.float32)
        for index, view in enumerate(views):
            levels = np.asarray(view)  # [H, W, 3] uint8
            for channel in range(3):
                # "clip" only saves NumPy's bounds check: an 8-bit index cannot be outside the table
                np.take(self._table[channel], levels[..., channel], out=out[index, channel], mode="clip")
        return out

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image to the part and the size that the model sees.

        Args:
            image: RGB, as `images.decode` gives it.

        Returns:
            8-bit RGB image of `output_size`.

        Raises:
            InputError: The image is not RGB, or so elongated that resizing it would need more than
                `MAX_RESIZED_PIXELS`.
        """
        if image.mode != "RGB":
            raise InputError(f"The picture has the colour mode {image.mode}, not RGB.", "Decode it first.")
        if self.pad_colour:
            image = _pad_to_square(image, self.pad_colour)
        if self.resize:
            width, height = image.size
            if isinstance(self.resize, tuple):
                new_size = self.resize
            elif width <= height:
                new_size = int(self.resize * height / width), self.resize
            else:
                new_size = self.resize, int(self.resize * width / height)
            image = self.resized(image, new_size)
        return _centre_crop(image, *self.crop_size) if self.crop_size else image

    def resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Resize an image to another (height, width) with this processor's filter.

        Raises:
            InputError: The result would exceed `MAX_RESIZED_PIXELS`, or the image exceeds `MAX_EDGE`.
        """
        _check_pixels(image, *size)
        return image.resize((size[1], size[0]), Image.Resampling(self.resample))


def _check_tiles(processor: ImageProcessor, crop_size: tuple[int, int] | None) -> None:
    """Refuse a processor whose tiles would not be square, or of another size than they are cut."""
    if processor.resize is None:
        raise unsupported("do_resize", False)
    if isinstance(processor.resize, tuple) and processor.resize[0] != processor.resize[1]:
        raise unsupported("size", processor.resize)
    height, width = processor.output_size
    if height != width or (crop_size and crop_size[0] != height):  # tiles are cut even if nothing is cropped
        raise unsupported("crop_size", crop_size)


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    edge = max(image.size)
    if image.width == image.height:
        return image
    _check_pixels(image, edge, edge)
    square = Image.new("RGB", (edge, edge), colour)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    # Floor division also for an edge that is too short: transformers then pads ceil(missing / 2) before it.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))  # Pillow fills with black beyond the edges


def _check_pixels(image: Image.Image, height: int, width: int) -> None:
    if height * width > MAX_RESIZED_PIXELS:
        raise InputError(
            f"A picture of {image.width} x {image.height} pixels is too elongated for this model: "
            f"it would be resized to {width} x {height}, more than {MAX_RESIZED_PIXELS:,} pixels.",
            "Crop it to the part that matters.",
        )
    if max(image.size) > MAX_EDGE:
        raise InputError(
            f"A picture of {image.width} x {image.height} pixels is too elongated: "
            f"an edge has more than {MAX_EDGE:,} pixels.",
            "Crop it to the part that matters.",
        )
