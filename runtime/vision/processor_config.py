"""Reader of a checkpoint's `preprocessor_config.json`, with the rules of transformers.

It knows the image processor classes of transformers, their defaults, and the forms in which sizes and
channels are written. `preprocess` applies the settings to images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UnsupportedError

__all__ = ["Defaults", "ProcessorSettings", "unsupported"]

_MOST = 1e9  # largest number that is accepted; much larger ones would overflow a float32

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults of a processor class of transformers, for settings that its configuration leaves out.

    Attributes:
        size: Shortest edge, or (height, width).
        crop_size: (height, width) of the centre crop; None for no crop.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        squares: Whether the class pads images to squares: never, if `do_pad` says so, or always. "always"
            marks the classes that tile: tiles are squares, and LLaVA-OneVision pads images that it does not
            tile. In those classes `do_pad` means to fill a batch with empty tiles, which is not done here.
    """

    size: int | tuple[int, int]
    crop_size: tuple[int, int] | None
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD
    squares: Literal["never", "do_pad", "always"] = "never"


_CLASSES = {
    "CLIPImageProcessor": Defaults(224, (224, 224)),
    "LlavaImageProcessor": Defaults(224, (224, 224), squares="do_pad"),
    "LlavaNextImageProcessor": Defaults(224, (224, 224), squares="always"),
    "LlavaNextVideoVideoProcessor": Defaults(224, (224, 224)),
    "LlavaOnevisionImageProcessor": Defaults((384, 384), None, squares="always"),
    "LlavaOnevisionVideoProcessor": Defaults((384, 384), None),
    "SiglipImageProcessor": Defaults((224, 224), None, _HALF, _HALF),
}


def unsupported(key: str, value: object) -> UnsupportedError:
    """Return the error for a setting that cannot be reproduced."""
    return UnsupportedError(
        f"The image processor's setting {key} = {value!r} is not supported.",
        "Use a checkpoint with a plain CLIP, SigLIP or LLaVA processor, or correct preprocessor_config.json.",
    )


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """The settings of one configuration.

    A key that is absent or null takes the default of its class, except that a null `do_...` means no. Every
    method raises `UnsupportedError` for a value of another form.

    Attributes:
        name: Name of the class, without its variant.
        defaults: Defaults of the class.
        given: Keys of the configuration that are not null.
    """

    name: str
    defaults: Defaults
    given: Mapping[str, object]

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ProcessorSettings:
        """Take the settings from a configuration, in which they may be under the key `image_processor`.

        Raises:
            UnsupportedError: The class is unknown.
        """
        nested = config.get("image_processor")
        settings = nested if isinstance(nested, Mapping) else config
        given = {key: value for key, value in settings.items() if value is not None}
        given |= {key: False for key in settings.keys() - given.keys() if key.startswith("do_")}
        keys = ("image_processor_type", "feature_extractor_type", "video_processor_type")
        name = next((given[key] for key in keys if key in given), None)
        base = (
            str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        )
        if base not in _CLASSES:
            raise UnsupportedError(
                f"The image processor type is {name!r}."
                if name
                else "The image processor's type is not given.",
                f"Set image_processor_type in preprocessor_config.json to one of: {', '.join(_CLASSES)}.",
            )
        return cls(base, _CLASSES[base], given)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean setting."""
        value = self.given.get(key, default)
        if not isinstance(value, bool):
            raise unsupported(key, value)
        return value

    def integer(self, key: str, default: int) -> int:
        """Return a whole number."""
        return _integer(key, self.given.get(key, default))

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        return _number(key, self.given.get(key, default))

    def channels(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Return a number for each channel. A single number stands for all three."""
        value = self.given.get(key, default)
        if isinstance(value, (int, float)):
            value = (value,) * 3
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise unsupported(key, value)
        red, green, blue = (_number(key, level) for level in value)
        return red, green, blue

    def size(self) -> int | tuple[int, int]:
        """Return the shortest edge, or (height, width)."""
        value = self.given.get("size", self.defaults.size)
        if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
            return _integer("size", value["shortest_edge"])
        # A bare number is the shortest edge in all classes, unless the configuration says otherwise.
        if isinstance(value, int) and not self.flag("default_to_square", False):
            return _integer("size", value)
        return _height_width("size", value)

    def crop_size(self) -> tuple[int, int] | None:
        """Return (height, width), even if nothing is cropped; None if there is no such setting."""
        value = self.given.get("crop_size", self.defaults.crop_size)
        return None if value is None else _height_width("crop_size", value)


def _integer(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise unsupported(key, value)
    return int(value)


def _number(key: str, value: object) -> float:
    # Compared with a limit, because `isfinite` raises for integers that are too large for a float.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -_MOST <= value <= _MOST:
        raise unsupported(key, value)
    return float(value)


def _height_width(key: str, value: object) -> tuple[int, int]:
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    elif isinstance(value, int):
        value = (value, value)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise unsupported(key, value)
    return _integer(key, value[0]), _integer(key, value[1])
