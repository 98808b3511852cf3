"""Tiles of images of any size, and the places of their tokens in the sequence.

An image is fitted into the best of the model's pinpoints (allowed sizes), padded, and cut into square tiles.
Before these comes the whole image, resized to one tile. The vision encoder gives N = side * side tokens for
each of the T tiles. The sequence has another order: first the tokens of the whole image, then the patches
of all other tiles put together, row by row over the full width, without the padding and with a newline
embedding after each row. LLaVA-OneVision first shrinks that grid if it is large.

`views` cuts an image. `arrange` gives the places of the tokens as index maps, so that no graph has a shape
that depends on the image's size. The results equal those of transformers, also in odd cases: of a very thin
image only the whole image may be left, or newlines without patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import InputError, UnsupportedError
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.runtime.vision.token_grid import TileCanvas, Tokens, averaged_lines, lines
from visprune.tiling import Tiling

__all__ = [
    "Arrangement",
    "Window",
    "arrange",
    "arrange_video",
    "best_pinpoint",
    "largest_size",
    "pixel_values",
    "views",
    "window",
]

_SHRINK_FROM = 1.1  # the grid is resampled if its sides would shrink by more than this factor


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """The places of one image's tokens in its part of the sequence.

    There are T tiles with N = side * side slots each. The first tile shows the whole image; in a video each
    tile is a frame. A slot holds one token of the sequence, or none. Without resampling, slots are patches.
    With it, a tile's tokens are in the upper left of its grid of slots, in the order of the image.

    Attributes:
        places: [T, N], int64, place of each slot's token in the image's sequence, newlines included; -1 for
            an empty slot.
        newline_places: [R], int64, places of the newline embeddings, ascending.
        sources: [T, N, J], int64, encoder tokens (tile * N + patch) of whose weighted sum each token is made.
            J is 1, or with resampling the number of tokens that one is made of.
        weights: [T, N, J], float32, their weights; zeros for an empty slot.
        grid: Rows and columns of the tiled part in the sequence; (0, 0) if there is only the whole image.
    """

    places: NDArray[np.int64]
    newline_places: NDArray[np.int64]
    sources: NDArray[np.int64]
    weights: NDArray[np.float32]
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        for array in (self.places, self.newline_places, self.sources, self.weights):
            array.setflags(write=False)  # an arrangement is shared by all images of its size

    @property
    def tiles(self) -> int:
        """T."""
        return len(self.places)

    @property
    def visual_tokens(self) -> int:
        """Tokens of the sequence without its newlines."""
        return int(np.count_nonzero(self.places >= 0))

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.visual_tokens + len(self.newline_places)


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the canvas (the tiles put together) that is not padding, in patches."""

    top: int
    left: int
    rows: int
    columns: int


def best_pinpoint(size: tuple[int, int], tiling: Tiling) -> tuple[int, int]:
    """Return the pinpoint in which an image keeps most of its pixels; among equals, the smallest one.

    Args:
        size: Height and width of the image.
        tiling: Tiling of the model.
    """
    height, width = size

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, -pinpoint[0] * pinpoint[1]

    return max(tiling.pinpoints, key=merit)


def window(size: tuple[int, int], tiling: Tiling) -> Window:
    """Return the part of its canvas that a tiled image covers. It depends on the ratio of its sides.

    Args:
        size: Height and width of the image.
        tiling: Tiling of the model.
    """
    height, width = size
    rows, columns = (edge // tiling.tile_size * tiling.side for edge in best_pinpoint(size, tiling))
    if width / height > columns / rows:
        top = (rows - _truncate(height * (columns / width))) // 2
        return Window(top, 0, rows - 2 * top, columns)
    left = (columns - _truncate(width * (rows / height))) // 2
    return Window(0, left, rows, columns - 2 * left)


@lru_cache(maxsize=16)
def arrange(size: tuple[int, int], tiling: Tiling, *, tiled: bool = True) -> Arrangement:
    """Return the arrangement of the tokens of one image.

    Args:
        size: Height and width of the image.
        tiling: Tiling of the model.
        tiled: False if the image is one tile, as for several images if `tiling.several` is "whole".

    Raises:
        InputError: The image is so elongated that resampling would leave no row or no column.
    """
    whole, end = _whole_tile(tiling.side), tiling.side**2
    if not tiled:
        return _arrangement((1, end), [whole], np.array([end], dtype=np.int64), (0, 0))
    height, width = (edge // tiling.tile_size for edge in best_pinpoint(size, tiling))
    seen = window(size, tiling)
    rows, columns = grid = _grid(size, seen, tiling)
    starts = end + np.arange(rows, dtype=np.int64) * (columns + 1)  # a row and its newline
    rest = TileCanvas(tiling.side, across=width, offset=end).tokens(
        lines(seen.rows, rows, tiling.side, start=seen.top),
        lines(seen.columns, columns, tiling.side, start=seen.left),
        starts[:, None] + np.arange(columns, dtype=np.int64),
    )
    return _arrangement((1 + height * width, end), [whole, rest], starts + columns, grid)


@lru_cache(maxsize=16)
def arrange_video(frames: int, tiling: Tiling) -> Arrangement:
    """Return the arrangement of the tokens of a video.

    Each frame is a tile, whose tokens are pooled as `tiling.frame_pooling` says. For LLaVA-OneVision they are
    resized to half its side, rounded up, and a newline ends the video.

    Args:
        frames: Number of frames, T.
        tiling: Tiling of the model.

    Raises:
        InputError: There is no frame.
    """
    if frames < 1:
        raise InputError("The video has no frames.", "Give at least one frame.")
    slots, edge = tiling.side**2, tiling.frame_pooling
    if edge is None:
        across = lines(tiling.side, -(-tiling.side // 2), tiling.side)
    else:
        across = averaged_lines(tiling.side, edge)
    pooled = len(across.slots)
    places = np.arange(pooled**2, dtype=np.int64).reshape(pooled, pooled)
    parts = [
        TileCanvas(tiling.side, offset=frame * slots).tokens(across, across, places + frame * pooled**2)
        for frame in range(frames)
    ]
    newlines = np.array([frames * pooled**2] if edge is None else [], dtype=np.int64)
    return _arrangement((frames, slots), parts, newlines, (0, 0))


def views(
    image: Image.Image, tiling: Tiling, processor: ImageProcessor, *, tiled: bool = True
) -> list[Image.Image]:
    """Cut an image into the views that the model sees: the whole image, and its tiles row by row.

    Args:
        image: RGB, as `images.decode` gives it.
        tiling: Tiling of the model.
        processor: Image processor of the model, which is applied to each tile.
        tiled: As for `arrange`.

    Returns:
        T images, 8-bit RGB, `tile_size` square.

    Raises:
        InputError: As for `ImageProcessor.crop`.
        UnsupportedError: The processor makes images of another size than tiles have.
    """
    edge = tiling.tile_size
    if processor.output_size != (edge, edge):
        raise UnsupportedError(
            f"The image processor makes pictures of {processor.output_size[1]} x {processor.output_size[0]} "
            f"pixels, and a tile has {edge} x {edge}.",
            "Correct size and crop_size in preprocessor_config.json.",
        )
    if not tiled:
        return [processor.crop(image)]
    resize = processor.resize or edge
    whole = processor.resized(image, (resize, resize) if isinstance(resize, int) else resize)
    canvas = _on_canvas(image, best_pinpoint((image.height, image.width), tiling), processor)
    corners = [(x, y) for y in range(0, canvas.height, edge) for x in range(0, canvas.width, edge)]
    tiles = (canvas.crop((x, y, x + edge, y + edge)) for x, y in corners)
    return [processor.crop(view) for view in (whole, *tiles)]


def pixel_values(
    image: Image.Image, tiling: Tiling, processor: ImageProcessor, *, tiled: bool = True
) -> NDArray[np.float32]:
    """Return the views of an image as a tensor for the vision encoder.

    Args and errors are those of `views`.

    Returns:
        Tensor [T, 3, H, W], float32, equal bit for bit to the Pillow processors of transformers.
    """
    return processor.tensor(views(image, tiling, processor, tiled=tiled))


def _on_canvas(image: Image.Image, pinpoint: tuple[int, int], processor: ImageProcessor) -> Image.Image:
    """Resize an image to fit into a pinpoint, in the middle of a black canvas."""
    height, width = pinpoint
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        size = min(math.ceil(image.height * by_width), height), width
    else:
        size = height, min(math.ceil(image.width * by_height), width)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(processor.resized(image, size), ((width - size[1]) // 2, (height - size[0]) // 2))
    return canvas


def largest_size(tiling: Tiling) -> tuple[int, int]:
    """Return height and width of an image that fills the pinpoint with the most pixels."""
    return max(tiling.pinpoints, key=lambda size: size[0] * size[1])


def _truncate(length: float) -> int:
    """Truncate to an integer, but first round away the float error of a product that should be whole."""
    return int(round(length, 7))


def _grid(size: tuple[int, int], seen: Window, tiling: Tiling) -> tuple[int, int]:
    """Return rows and columns of the tiled part in the sequence."""
    rows, columns = seen.rows, seen.columns
    if tiling.max_tiles is None:
        return rows, columns
    shrink = math.sqrt(rows * columns / (tiling.max_tiles * tiling.side**2))
    if shrink <= _SHRINK_FROM:
        return rows, columns
    rows, columns = int(rows // shrink), int(columns // shrink)
    if not (rows and columns):
        raise InputError(
            f"A picture of {size[1]} x {size[0]} pixels is too elongated for this model: "
            "nothing would be left of its shorter side.",
            "Crop it to the part that matters.",
        )
    return rows, columns


def _whole_tile(side: int) -> Tokens:
    """Return the tokens of one tile that comes first and is not resampled."""
    places = np.arange(side**2, dtype=np.int64).reshape(side, side)
    return TileCanvas(side).tokens(lines(side, side, side), lines(side, side, side), places)


def _arrangement(
    shape: tuple[int, int], parts: list[Tokens], newline_places: NDArray[np.int64], grid: tuple[int, int]
) -> Arrangement:
    """Fill T tiles of N slots (`shape`) with tokens."""
    slots, mixed = shape[0] * shape[1], max(part.sources.shape[1] for part in parts)
    places = np.full(slots, -1, dtype=np.int64)
    sources = np.arange(slots, dtype=np.int64)[:, None].repeat(mixed, 1)
    weights = np.zeros((slots, mixed), dtype=np.float32)
    for part in parts:
        used = slice(part.sources.shape[1])
        places[part.slots] = part.places
        sources[part.slots, used] = part.sources
        weights[part.slots, used] = part.weights
    return Arrangement(
        places.reshape(shape),
        newline_places,
        sources.reshape(*shape, mixed),
        weights.reshape(*shape, mixed),
        grid,
    )
