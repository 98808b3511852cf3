"""Forms in which an image may be given, and their conversion to a path, the bytes of a file, or pixels.

Images are never downloaded: a machine that answers questions should not fetch URLs that a question names.
`images` decodes images.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError

__all__ = [
    "ImageSource",
    "Video",
    "VisualInput",
    "absolute",
    "as_list",
    "as_path_bytes_or_image",
    "display_name",
    "locate",
]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | NDArray[np.uint8] | Image.Image"
)
"""A path, a `data:` URL, the bytes of a file, a file opened in binary mode (read from its beginning if it can
seek), pixels as a NumPy array of uint8 ([H, W, 3] in the order RGB, or [H, W] of grey), or a Pillow image."""


@dataclass(frozen=True, slots=True)
class Video:
    """The frames of one video, in order. Each may have any form of an image."""

    frames: Sequence[ImageSource]


VisualInput: TypeAlias = "ImageSource | Video"

_TAKEN = (
    "Give a path, a data: URL, the bytes of a file, a file opened in binary mode, a Pillow image, or a NumPy "
    "array of uint8: [H, W, 3] in the order RGB, or [H, W] of grey."
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_URL_AS_PATH = re.compile(r"(https?|ftp|s3|gs|file):/[^/]", re.IGNORECASE)  # Path turns // into /
_SHOWN = 80  # most characters of a URL in a message


def locate(text: str) -> Path | bytes:
    """Return the path that a text is, or the bytes that a `data:` URL contains.

    Raises:
        InputError: The text is another URL, or a damaged `data:` URL.
    """
    if display_name(text) != text:
        return _of_data_url(text)
    if _URL.match(text):
        raise InputError(
            f"{_short(text)} is a URL, and pictures are not downloaded.",
            "Save the picture as a file first, and give its path.",
        )
    return Path(text)


def display_name(text: str) -> str:
    """Return a text for `locate` in a short form for people: a path as it is, a `data:` URL without data."""
    return "a data: URL" if text[:5].lower() == "data:" else text


def absolute(text: str) -> str:
    """Return a text for `locate` that means the same in any working directory.

    Raises:
        InputError: As for `locate`.
    """
    place = locate(text)
    return text if isinstance(place, bytes) else str(place.resolve())


def as_path_bytes_or_image(source: object) -> Path | bytes | Image.Image:
    """Convert an image to a path, the bytes of a file, or a Pillow image.

    Raises:
        InputError: The source has none of the forms in `ImageSource`, or a file object cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str):
        return locate(source)
    if isinstance(source, os.PathLike):
        return _path(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, np.ndarray):
        return _of_array(source)
    if callable(getattr(source, "read", None)):
        return _read(source)
    kind = type(source)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise InputError(f"A picture was given as {name}, which is not supported.", _TAKEN)


def as_list(images: VisualInput | Sequence[VisualInput] | None) -> list[VisualInput]:
    """Return a list of images and videos from one, several or None. An array is one image."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _of_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    content = unquote_to_bytes(data.encode("utf-8", "replace"))
    try:
        if head.lower().rstrip().endswith(";base64"):
            packed = b"".join(content.split())
            content = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except ValueError as error:
        raise InputError(
            f"The picture in a data: URL is not base64: {error}.",
            "Encode it again, or give a path.",
        ) from None
    if not comma or not content:
        raise InputError(
            f"The data: URL {_short(url)!r} holds no data.",
            "Write it as data:image/png;base64, and then the file in base64, or give a path.",
        )
    return content


def _path(source: os.PathLike[Any]) -> Path:
    text = os.fsdecode(source)
    if _URL_AS_PATH.match(text) or display_name(text) != text:
        raise InputError(
            f"{_short(text)} is a URL made into a path, which changes it.",
            "Give a data: URL as a text (str). From elsewhere pictures are not downloaded: save them first.",
        )
    return Path(text)


def _of_array(array: NDArray[Any]) -> Image.Image:
    """Copy the pixels of an array, so that later changes of the array do not change the image."""
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise InputError(
            f"A NumPy array of {array.dtype} {list(array.shape)} was given, which is no picture.", _TAKEN
        )
    if 0 in array.shape:
        raise InputError(
            f"A NumPy array of {list(array.shape)} was given, which has no pixels.",
            "Give a picture that is not empty.",
        )
    return Image.fromarray(np.array(array, order="C", subok=False))


def _read(file: Any) -> bytes:
    """Read a whole binary file, from its beginning if it can seek, as Pillow does."""
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(0)
        content = file.read()
    except Exception as error:  # a user's file object may raise anything
        raise InputError(f"The picture's file object cannot be read: {error}.", _TAKEN) from error
    if not isinstance(content, bytes):
        raise InputError(
            f"The picture's file object gives {type(content).__name__}, not bytes.",
            "Open it in binary mode: open(path, 'rb').",
        )
    return content


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
