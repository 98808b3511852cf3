"""Decoding of images and of the frames of videos.

`decode` defines one conversion to RGB for every colour mode, so that the same file gives the same pixels on
every machine. `sources` knows the forms in which an image may be given. This file knows nothing of models;
resizing and normalising are in `preprocess`.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visprune.errors import InputError, UsageError
from visprune.runtime.vision.sources import ImageSource, as_path_bytes_or_image

__all__ = ["MAX_PIXELS", "decode", "decode_frames"]

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: 256 MiB as RGB. Pillow warns of larger ones."""

# Pillow also reads formats that start other programs (EPS runs Ghostscript) or are no usual image formats.
# An untrusted file should not be able to choose one of those. Each format has its plugin in Pillow.
_PLUGINS = {
    "JPEG": "Jpeg",
    "MPO": "Mpo",
    "PNG": "Png",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "PPM": "Ppm",
    "AVIF": "Avif",
    "JPEG2000": "Jpeg2K",
    "ICO": "Ico",
}
_FORMATS_HINT = "Give a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000 or ICO picture."


def decode(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """Read an image as 8-bit RGB.

    The EXIF orientation is applied. Transparency (an alpha channel, or a transparent colour of a palette,
    grey or RGB image) is composited over white. CMYK and the other colour spaces are converted by Pillow.
    Grey images of more than 8 bits are scaled linearly, so that 65535 becomes 255; 32-bit integers have the
    same scale and are clipped. 16-bit colour is reduced to its upper 8 bits by Pillow. Float images, for
    which white is not defined, are read as 0 to 1 if no value exceeds 1, as 0 to 255 otherwise, and clipped.
    An animation gives its first frame; a Pillow image its current frame.

    Args:
        source: A path, a `data:` URL, the bytes of a file, a file opened in binary mode, a Pillow image, or
            pixels as a NumPy array of uint8: [H, W, 3] in the order RGB (OpenCV's is BGR), or [H, W] of grey.
            The source is not changed.
        max_pixels: A lower limit than `MAX_PIXELS`, or None.

    Returns:
        A new image of mode RGB with empty metadata, so that decoding it again changes nothing.

    Raises:
        InputError: The source is something else, such as another URL. Or the file is missing, a directory,
            not an image, damaged, of zero size, of a mode that cannot become RGB, or larger than
            the limit (which is checked before the pixels are decoded).
    """
    given = as_path_bytes_or_image(source)
    if isinstance(given, Image.Image):
        with _as_input_errors("The picture"):
            return _to_rgb(given, "The picture", max_pixels)
    if isinstance(given, bytes):
        return _read(io.BytesIO(given), "The picture", max_pixels)
    path = given
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"There is no picture at {path}.", "Check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not a picture.", "Name one file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The picture {path} cannot be opened: {error}.", "Check the path.") from None
    with stream:
        return _read(stream, f"The picture {path}", max_pixels)


def decode_frames(source: str | Path, count: int) -> list[Image.Image]:
    """Read evenly spaced frames of a video: of n frames, those with the index floor((i + 1/2) n / count).

    Args:
        source: A folder, whose images are the frames in the order of their names, or an animated image,
            which may also be a `data:` URL.
        count: Number of frames to read; all if there are fewer.

    Returns:
        The frames, as `decode` returns images.

    Raises:
        InputError: There is no frame, a frame cannot be read, or the source is another URL.
        UsageError: The count is not positive.
    """
    if count < 1:
        raise UsageError(f"Cannot take {count} frames.", "Give a number of at least 1.")
    given = as_path_bytes_or_image(source)
    assert not isinstance(given, Image.Image)
    if isinstance(given, bytes):
        return _frames(io.BytesIO(given), count, "The video given as bytes")
    try:
        if os.path.isdir(given):  # noqa: PTH112 - Path.is_dir raises on names that no file can have
            files = sorted(f for f in given.iterdir() if f.is_file() and not f.name.startswith("."))
            return [decode(files[index]) for index in _spaced(len(files), count, str(given))]
        stream = given.open("rb")
    except FileNotFoundError:
        raise InputError(
            f"There is no video at {given}.", "Give a folder of pictures, or an animated one."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"The video {given} cannot be opened: {error}.", "Check the path.") from None
    with stream:
        return _frames(stream, count, f"The video {given}")


def _frames(stream: IO[bytes], count: int, label: str) -> list[Image.Image]:
    with _opened(stream, label) as film:
        found = []
        for index in _spaced(getattr(film, "n_frames", 1), count, label):
            film.seek(index)
            found.append(_to_rgb(film, label))
        return found


def _spaced(total: int, count: int, label: str) -> list[int]:
    """Return the indices of evenly spaced frames, at most `count` of `total`."""
    if not total:
        raise InputError(f"{label} holds no pictures.", "Give a folder of frames.")
    number = min(total, count)
    return [(2 * index + 1) * total // (2 * number) for index in range(number)]


def _read(stream: IO[bytes], label: str, max_pixels: int | None) -> Image.Image:
    with _opened(stream, label) as image:
        return _to_rgb(image, label, max_pixels)


@contextmanager
def _opened(stream: IO[bytes], label: str) -> Iterator[Image.Image]:
    """Open an image; anything that goes wrong with it is an InputError."""
    with (
        _as_input_errors(label),
        warnings.catch_warnings(),
    ):
        # Pillow warns of a large image when it reads the header; some plugins again when they load it.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=_formats()) as image:
            yield image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Load the plugins of the formats, and return those that this build of Pillow has.

    Pillow itself would load all of its plugins, which takes several times as long.
    """
    for plugin in _PLUGINS.values():
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in _PLUGINS if name in Image.OPEN)  # Pillow raises KeyError for others


@contextmanager
def _as_input_errors(label: str) -> Iterator[None]:
    """Turn every error of the block into an InputError about the image."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(label, MAX_PIXELS) from None
    except UnidentifiedImageError:
        raise InputError(f"{label} is not a picture in a known format.", _FORMATS_HINT) from None
    except MemoryError:  # a damaged file may ask for any amount of memory
        raise InputError(
            f"{label} takes more memory than there is.", "It is damaged, or too large: scale it down first."
        ) from None
    except Exception as error:  # with a damaged file, Pillow's plugins raise almost anything
        raise InputError(f"{label} is damaged or cut short: {error}.", _FORMATS_HINT) from error


def _too_large(label: str, limit: int) -> InputError:
    return InputError(
        f"{label} has more pixels than the limit of {limit:,}.",
        "Scale it down first; the model sees a few hundred pixels a side anyway.",
    )


def _to_rgb(image: Image.Image, label: str, max_pixels: int | None = None) -> Image.Image:
    limit = MAX_PIXELS if max_pixels is None else min(MAX_PIXELS, max_pixels)
    width, height = image.size
    if width * height == 0:
        raise InputError(
            f"{label} has a size of {width} x {height} pixels.", "Give a picture that is not empty."
        )
    if width * height > limit:
        raise _too_large(label, limit)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image, label)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    try:
        rgb = image.convert("RGB")  # a copy, even if the image is RGB already
    except ValueError:
        raise InputError(
            f"{label} has the colour mode {image.mode}, which cannot become RGB.", "Save it as RGB first."
        ) from None
    rgb.info.clear()
    return rgb


def _grey_to_8_bits(image: Image.Image, label: str) -> Image.Image:
    """Scale a grey image of integers or floats to 8 bits, as `decode` describes."""
    values = np.asarray(image)  # [H, W] of 16- or 32-bit integers, or float32
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise InputError(f"{label} has pixels that are not numbers.", "Save it with 8 bits a channel.")
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    grey = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257  # rounds v * 255 / 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
