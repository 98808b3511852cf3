"""A checkpoint's `preprocessor_config.json`, read as transformers reads it.

Knows the image processor classes of transformers, what each does where the configuration says nothing, and
the forms in which sizes and channels are written. What the settings do to a picture is in `preprocess`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UnsupportedError

__all__ = ["Defaults", "ProcessorSettings", "unsupported"]

_MOST = 1e9  # of any number; what is far beyond a float32 would overflow on the way

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a processor class of transformers does where its configuration says nothing.

    Attributes:
        size: The shortest edge, or (height, width).
        crop_size: Of the centre crop; None: there is none.
        mean: Of the channels.
        std: Of the channels.
        squares: Whether it pads pictures to squares: never, where `do_pad` says so, or always. That is the
            mark of the classes that tile: tiles are squares anyway, and LLaVA-OneVision pads what it does not
            tile. By `do_pad` they mean filling a batch up with empty tiles, which is not done here.
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
    "LlavaOnevisionImageProcessor": Defaults((384, 384), None, squares="always"),
    "LlavaOnevisionVideoProcessor": Defaults((384, 384), None),
    "SiglipImageProcessor": Defaults((224, 224), None, _HALF, _HALF),
}


def unsupported(key: str, value: object) -> UnsupportedError:
    """What to raise where a setting cannot be reproduced."""
    return UnsupportedError(
        f"The image processor's setting {key} = {value!r} is not supported.",
        "Use a checkpoint with a plain CLIP, SigLIP or LLaVA processor, or correct preprocessor_config.json.",
    )


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """The content of one configuration.

    An absent key takes the default of its class, and so does a null one, except that a null `do_...` means
    no. Every reader refuses with `UnsupportedError` what has another form.
    """

    name: str
    defaults: Defaults
    given: Mapping[str, object]

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ProcessorSettings:
        """The settings of a configuration, which may lie under the key `image_processor`.

        Raises:
            UnsupportedError: They are of a class that is not known.
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
        """A yes or no."""
        value = self.given.get(key, default)
        if not isinstance(value, bool):
            raise unsupported(key, value)
        return value

    def integer(self, key: str, default: int) -> int:
        """A whole number."""
        return _integer(key, self.given.get(key, default))

    def number(self, key: str, default: float) -> float:
        """A number."""
        return _number(key, self.given.get(key, default))

    def channels(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """A number for each channel, or one for all."""
        value = self.given.get(key, default)
        if isinstance(value, (int, float)):
            value = (value,) * 3
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise unsupported(key, value)
        red, green, blue = (_number(key, level) for level in value)
        return red, green, blue

    def size(self) -> int | tuple[int, int]:
        """The shortest edge, or (height, width)."""
        value = self.given.get("size", self.defaults.size)
        if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
            return _integer("size", value["shortest_edge"])
        # A bare number is the shortest edge in all classes, unless the configuration says otherwise.
        if isinstance(value, int) and not self.flag("default_to_square", False):
            return _integer("size", value)
        return _height_width("size", value)

    def crop_size(self) -> tuple[int, int] | None:
        """(height, width), also where nothing is cropped; None: it is not given."""
        value = self.given.get("crop_size", self.defaults.crop_size)
        return None if value is None else _height_width("crop_size", value)


def _integer(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise unsupported(key, value)
    return int(value)


def _number(key: str, value: object) -> float:
    # Compared, because `isfinite` fails on integers that are too large for a float.
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
