"""Pictures in and out: decoding whatever a user hands over, and drawing what pruning kept.

`decode` fixes one reading of every picture mode, so that the same file gives the same pixels on every
machine. The overlay shows the picture the model saw, not the file: what a crop cut away is not in it.
This file knows nothing of models; resizing and normalising are in `preprocess`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visprune.errors import InputError, UsageError

__all__ = ["MAX_PIXELS", "decode", "overlay"]

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded, in pixels: 256 MiB as RGB, the size from which Pillow warns."""

# Pillow also knows formats that start other programs (EPS runs Ghostscript) or that nobody photographs
# with; an untrusted file should not be able to choose one of those.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
_FORMATS_HINT = "Give a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM picture."

_OVERLAY_WIDTH = 480
_OVERLAY_COLOUR = (255, 176, 0)
_DIMMED = 0.35


def decode(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Reads a picture as 8-bit RGB.

    The EXIF orientation is applied. Transparency (an alpha channel, or a transparent colour of a palette,
    grey or RGB picture) is composited over white. CMYK and the other colour spaces are converted by Pillow.
    Grey pictures of more than 8 bits are scaled linearly, 65535 becoming 255; 32-bit integers are read on
    the same scale and clipped. 16-bit colour is cut to its upper 8 bits by Pillow. Float pictures, which
    have no agreed white, are read as 0 to 1 if no value exceeds 1 and as 0 to 255 otherwise, and clipped.
    Of an animation the first frame is read; an `Image` is taken at the frame it stands at.

    Args:
        source: A path, the bytes of a file, or a Pillow image, which is not changed.

    Returns:
        A new picture of mode RGB with empty metadata, so that decoding it again changes nothing.

    Raises:
        InputError: The file is missing, a directory, no picture, damaged, of zero size, of a mode that
            cannot become RGB, or larger than `MAX_PIXELS` (checked before the pixels are decoded).
    """
    if isinstance(source, Image.Image):
        with _as_input_errors("The picture"):
            return _to_rgb(source, "The picture")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "The picture given as bytes")
    path = Path(source)
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"There is no picture at {path}.", "Check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not a picture.", "Name one file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The picture {path} cannot be opened: {error}.", "Check the path.") from None
    with stream:
        return _read(stream, f"The picture {path}")


def overlay(pixels: Image.Image, keep_indices: NDArray[np.int64], grid: tuple[int, int]) -> Image.Image:
    """Draws which patches of a picture were kept.

    Dropped patches are dimmed and lose their colour; a thin line runs around the kept regions. Pixels
    beyond the last whole patch, which the vision tower does not see, count as dropped.

    Args:
        pixels: What the model saw, RGB, as `ImageProcessor.crop` gives it.
        keep_indices: Kept patches [K], int64, row-major in the grid, in any order.
        grid: Rows and columns of patches.

    Returns:
        RGB picture, enlarged by a whole factor to be at least 480 pixels wide.

    Raises:
        UsageError: The grid does not fit the picture, or an index lies outside the grid.
    """
    rows, columns = grid
    patch_height, patch_width = (pixels.height // rows, pixels.width // columns) if min(grid) > 0 else (0, 0)
    if not (patch_height and patch_width):
        raise UsageError(
            f"A grid of {rows} x {columns} patches does not fit a picture of "
            f"{pixels.height} x {pixels.width} pixels.",
            "Pass the grid of the vision tower that saw this picture.",
        )
    if keep_indices.size and not (keep_indices.min() >= 0 and keep_indices.max() < rows * columns):
        raise UsageError(
            f"A kept patch has an index outside a grid of {rows} x {columns} patches.",
            "Pass the keep_indices of one image.",
        )
    scale = -(-_OVERLAY_WIDTH // pixels.width)  # ceiling; at least 1
    shown = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)

    patches = np.zeros(rows * columns, dtype=bool)
    patches[keep_indices] = True
    kept = np.zeros((shown.height, shown.width), dtype=bool)
    block = patches.reshape(rows, columns).repeat(patch_height * scale, 0).repeat(patch_width * scale, 1)
    kept[: block.shape[0], : block.shape[1]] = block

    line = max(1, shown.width // 300)
    framed = np.pad(kept, line)  # beyond the picture nothing is kept, so a region closes at the border
    inner = framed[: -2 * line, line:-line] & framed[2 * line :, line:-line]
    inner &= framed[line:-line, : -2 * line] & framed[line:-line, 2 * line :]

    colour = np.array(shown)  # [H, W, 3]
    grey = np.asarray(shown.convert("L"), dtype=np.float32) * _DIMMED
    colour[~kept] = grey.astype(np.uint8)[~kept, None]
    colour[kept & ~inner] = _OVERLAY_COLOUR
    return Image.fromarray(colour)


def _read(stream: IO[bytes], label: str) -> Image.Image:
    Image.init()  # registers every plugin: naming a format that this build of Pillow lacks is a KeyError
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with (
        _as_input_errors(label),
        warnings.catch_warnings(),
    ):
        # Pillow warns from the header, and some plugins again while loading: here it is an error.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=formats) as image:
            return _to_rgb(image, label)


@contextmanager
def _as_input_errors(label: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(label) from None
    except UnidentifiedImageError:
        raise InputError(f"{label} is not a picture in a known format.", _FORMATS_HINT) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
        raise InputError(f"{label} is damaged or cut short: {error}.", _FORMATS_HINT) from error


def _too_large(label: str) -> InputError:
    return InputError(
        f"{label} has more pixels than the limit of {MAX_PIXELS:,}.",
        "Scale it down first; the model sees a few hundred pixels a side anyway.",
    )


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise InputError(
            f"{label} has a size of {width} x {height} pixels.", "Give a picture that is not empty."
        )
    if width * height > MAX_PIXELS:
        raise _too_large(label)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image, label)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    try:
        rgb = image.convert("RGB")  # a copy even of an RGB picture
    except ValueError:
        raise InputError(
            f"{label} has the colour mode {image.mode}, which cannot become RGB.", "Save it as RGB first."
        ) from None
    rgb.info.clear()
    return rgb


def _grey_to_8_bits(image: Image.Image, label: str) -> Image.Image:
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
