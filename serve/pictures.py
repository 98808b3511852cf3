"""Pictures of a request: taken from its `data:` URLs, or fetched, and measured before they are decoded.

No other URL and no path is ever opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from visprune.errors import InputError, UnsupportedError
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.sources import locate
from visprune.serve.fetch import Fetcher

__all__ = ["PictureReader"]

_SHOWN = 80  # the most characters of a URL in a message
_HINT = "Send the picture as data:image/jpeg;base64, and then the file in base64."
_MAX_ELONGATION = 100
"""The longest side of a picture by its shortest one. A model's processor scales the shortest side to a few
hundred pixels, so that a thread of a few thousand pixels would take a gigabyte."""


@dataclass(frozen=True, slots=True)
class PictureReader:
    """Reads pictures within limits.

    Attributes:
        fetcher: Fetches from the hosts that the operator allowed.
        max_pixels: The most pixels of all pictures of a request.
    """

    fetcher: Fetcher
    max_pixels: int

    def read(self, url: str) -> bytes:
        """Return the file that a URL holds or names.

        Raises:
            InputError: It holds nothing or no base64, or cannot be fetched.
            UnsupportedError: It is a path, or has a scheme that is not taken.
        """
        scheme = url[:_SHOWN].partition(":")[0].lower() if ":" in url[:_SHOWN] else ""
        if scheme == "data":
            return _unpack(url)
        if scheme in ("http", "https"):
            return self.fetcher.fetch(url)
        raise UnsupportedError(
            f"{url[:_SHOWN]!r} is no data: URL, and this server opens neither files nor other schemes.",
            _HINT,
        )

    def decode(self, contents: Iterable[bytes]) -> Iterator[Image.Image]:
        """Yield the pixels of each file of a request. One that is too large is refused by its header.

        Raises:
            InputError: A file is no picture, is damaged, is too elongated, or has more pixels than the
                others left.
        """
        left = self.max_pixels
        for content in contents:
            image = decode(content, left)
            left -= image.width * image.height
            if max(image.size) > _MAX_ELONGATION * min(image.size):
                raise InputError(
                    f"A picture of {image.width} x {image.height} pixels is too elongated.",
                    "Crop it to the part that matters.",
                )
            yield image


def _unpack(url: str) -> bytes:
    """Return the file in a `data:` URL. Advice to give a path is of no use to a client."""
    try:
        content = locate(url)
    except InputError as error:
        raise InputError(error.what, _HINT) from None
    assert isinstance(content, bytes)
    return content
