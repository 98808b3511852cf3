"""From a picture to the tensor a vision tower takes, as the checkpoint's own processor makes it.

Reproduces the Pillow-based image processors of transformers (CLIP, SigLIP, LLaVA) to the last bit, from the
`preprocessor_config.json` that the checkpoint ships. Everything up to the crop happens on 8-bit pixels,
so rescaling and normalising are one table of 256 values a channel. Decoding files is in `images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError, UnsupportedError

__all__ = ["MAX_RESIZED_PIXELS", "ImageProcessor"]

MAX_RESIZED_PIXELS = 2**28
"""Largest intermediate picture, in pixels: resizing the short edge of a strip makes it grow without bound."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a processor class of transformers does where its configuration says nothing."""

    size: int | tuple[int, int]  # the shortest edge, or (height, width)
    crop_size: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    can_pad: bool  # `do_pad` means "pad to a square" in this class


_CLASSES = {
    "CLIPImageProcessor": _Defaults(224, (224, 224), _CLIP_MEAN, _CLIP_STD, can_pad=False),
    "LlavaImageProcessor": _Defaults(224, (224, 224), _CLIP_MEAN, _CLIP_STD, can_pad=True),
    "SiglipImageProcessor": _Defaults((224, 224), None, _HALF, _HALF, can_pad=False),
}


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Pads, resizes, crops, rescales and normalises one picture, in this order.

    Attributes:
        pad_colour: RGB colour with which the shorter edge is padded on both sides first; None: no padding.
        resize: Shortest edge after resizing, or (height, width); None: no resizing.
        resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        crop_size: (height, width) of the centre crop; None: no crop. Where the picture is smaller it is
            surrounded by black *before* rescaling and normalising.
        rescale_factor: Multiplies the 8-bit values; 1.0 for no rescaling.
        mean: Subtracted from each channel after rescaling; zeros for no normalising.
        std: Divides each channel then; ones for no normalising.

    Raises:
        UnsupportedError: A setting means nothing, or the tensors would vary in size.
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
        if min((*self.output_size, *edges)) <= 0:
            raise _unsupported("size and crop_size", (self.resize, self.crop_size))
        if self.resample not in list(Image.Resampling):
            raise _unsupported("resample", self.resample)
        if 0.0 in self.std or not all(isfinite(v) for v in (*self.mean, *self.std, self.rescale_factor)):
            raise _unsupported("image_mean and image_std", (self.mean, self.std))
        if self.pad_colour and not all(0 <= level <= 255 for level in self.pad_colour):
            raise _unsupported("do_pad with a colour", self.pad_colour)
        # In the dtypes and the order of transformers, so that each of the 256 values is the same float32.
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))  # [3, 1]
        object.__setattr__(self, "_table", (levels - mean) / std)  # [3, 256]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of every tensor; settings with which they would vary are refused."""
        if self.crop_size:
            return self.crop_size
        if isinstance(self.resize, tuple):
            return self.resize
        if self.pad_colour and self.resize:  # a square's shortest edge is both edges
            return (self.resize, self.resize)
        raise UnsupportedError(
            "The image processor neither crops nor resizes to a fixed size, so tensors would vary in size.",
            "Set do_center_crop and crop_size, or a size with height and width, in preprocessor_config.json.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ImageProcessor:
        """Reads the configuration of a CLIP, SigLIP or LLaVA image processor.

        Any variant of the class name (`...Fast`, `...Pil`, the old `...FeatureExtractor`) means the Pillow
        processor. An absent key takes the default of its class, and so does a null one, except that a null
        `do_...` means no; keys that the classes ignore are ignored here too.

        Args:
            config: The content of `preprocessor_config.json`, or of the newer `processor_config.json`,
                which holds the same under the key `image_processor`.

        Raises:
            UnsupportedError: Another class, or a setting that is not supported.
        """
        nested = config.get("image_processor")
        settings = nested if isinstance(nested, Mapping) else config
        given = {key: value for key, value in settings.items() if value is not None}
        given |= {key: False for key in settings.keys() - given.keys() if key.startswith("do_")}
        name, defaults = _class_of(given)
        pads = _flag(given, "do_pad", False)
        if pads and not defaults.can_pad:
            raise _unsupported(f"do_pad (of a {name})", True)
        if _flag(given, "use_square_size", False):
            raise _unsupported("use_square_size", True)
        mean = _channels(given, "image_mean", defaults.mean)
        normalises = _flag(given, "do_normalize", True)
        return cls(
            # int() cuts as transformers does; rounding would give a colour one level brighter
            pad_colour=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)) if pads else None,
            resize=_resize(given, defaults.size) if _flag(given, "do_resize", True) else None,
            resample=_integer("resample", given.get("resample", Image.Resampling.BICUBIC)),
            crop_size=_crop_size(given, defaults.crop_size),
            rescale_factor=(
                _number("rescale_factor", given.get("rescale_factor", 1 / 255))
                if _flag(given, "do_rescale", True)
                else 1.0
            ),
            mean=mean if normalises else (0.0, 0.0, 0.0),
            std=_channels(given, "image_std", defaults.std) if normalises else (1.0, 1.0, 1.0),
        )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Makes the `pixel_values` of one picture.

        Args:
            image: RGB, as `images.decode` gives it.

        Returns:
            Tensor [1, 3, H, W], float32, equal bit for bit to the Pillow processor of transformers.

        Raises:
            InputError: As for `crop`.
        """
        levels = np.asarray(self.crop(image))  # [H, W, 3] uint8
        out = np.empty((1, 3, *levels.shape[:2]), dtype=np.float32)
        for channel in range(3):
            # "clip" only spares numpy its bounds check: an 8-bit index cannot leave the table
            np.take(self._table[channel], levels[..., channel], out=out[0, channel], mode="clip")
        return out

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, at the size it sees it.

        Args:
            image: RGB, as `images.decode` gives it.

        Returns:
            8-bit RGB picture of `output_size`.

        Raises:
            InputError: The picture is not RGB, or so elongated that resizing it would need more than
                `MAX_RESIZED_PIXELS`.
        """
        if image.mode != "RGB":
            raise InputError(f"The picture has the colour mode {image.mode}, not RGB.", "Decode it first.")
        if self.pad_colour:
            image = _pad_to_square(image, self.pad_colour)
        if self.resize:
            width, height = image.size
            if isinstance(self.resize, tuple):
                new_height, new_width = self.resize
            elif width <= height:
                new_height, new_width = int(self.resize * height / width), self.resize
            else:
                new_height, new_width = self.resize, int(self.resize * width / height)
            _check_pixels(image, new_height, new_width)
            image = image.resize((new_width, new_height), Image.Resampling(self.resample))
        return _centre_crop(image, *self.crop_size) if self.crop_size else image


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    edge = max(image.size)
    if image.width == image.height:
        return image
    _check_pixels(image, edge, edge)
    square = Image.new("RGB", (edge, edge), colour)
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    # Floor division also where the edge is too short: there transformers pads ceil(missing / 2) before it.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))  # Pillow fills with black beyond the edges


def _check_pixels(image: Image.Image, height: int, width: int) -> None:
    if height * width > MAX_RESIZED_PIXELS:
        raise InputError(
            f"A picture of {image.width} x {image.height} pixels is too elongated for this model: "
            f"on the way it would grow to {width} x {height}, more than {MAX_RESIZED_PIXELS:,} pixels.",
            "Crop it to the part that matters.",
        )


def _unsupported(key: str, value: object) -> UnsupportedError:
    return UnsupportedError(
        f"The image processor's setting {key} = {value!r} is not supported.",
        "Use a checkpoint with a plain CLIP, SigLIP or LLaVA processor, or correct preprocessor_config.json.",
    )


def _class_of(given: Mapping[str, object]) -> tuple[str, _Defaults]:
    name = given.get("image_processor_type") or given.get("feature_extractor_type")
    base = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if base not in _CLASSES:
        raise UnsupportedError(
            f"The image processor type is {name!r}." if name else "The image processor's type is not given.",
            f"Set image_processor_type in preprocessor_config.json to one of: {', '.join(_CLASSES)}.",
        )
    return base, _CLASSES[base]


def _flag(given: Mapping[str, object], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise _unsupported(key, value)
    return value


def _integer(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _unsupported(key, value)
    return int(value)


def _number(key: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _unsupported(key, value)
    return float(value)


def _channels(
    given: Mapping[str, object], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = given.get(key, default)
    if isinstance(value, (int, float)):
        value = (value,) * 3
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise _unsupported(key, value)
    red, green, blue = (_number(key, level) for level in value)
    return red, green, blue


def _resize(given: Mapping[str, object], default: int | tuple[int, int]) -> int | tuple[int, int]:
    value = given.get("size", default)
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return _integer("size", value["shortest_edge"])
    # A bare number is the shortest edge in all three classes, unless the configuration says otherwise.
    if isinstance(value, int) and not _flag(given, "default_to_square", False):
        return _integer("size", value)
    return _height_width("size", value)


def _crop_size(given: Mapping[str, object], default: tuple[int, int] | None) -> tuple[int, int] | None:
    if not _flag(given, "do_center_crop", default is not None):
        return None
    return _height_width("crop_size", given.get("crop_size", default))


def _height_width(key: str, value: object) -> tuple[int, int]:
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    elif isinstance(value, int):
        value = (value, value)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise _unsupported(key, value)
    return _integer(key, value[0]), _integer(key, value[1])
