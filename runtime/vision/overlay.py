"""Drawing of the patches of an image that pruning kept.

An overlay shows the image that the model saw, without the parts that were cropped away. For a tiled image
it is two images side by side: the whole image, and the tiles put together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from visprune.errors import UsageError
from visprune.runtime.vision.arrangement import arrange, best_pinpoint, views, window
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.tiling import Tiling

__all__ = ["overlay", "overlay_tiled"]

_LONGER_SIDE = 480
_COLOUR = (255, 176, 0)
_DIMMED = 0.35

_TALLEST = 1536
_WIDEST = 4  # times the height; a longer strip is scaled down to that
_GAP = 16


def overlay(
    pixels: Image.Image,
    keep_indices: NDArray[np.int64],
    grid: tuple[int, int],
    merged: NDArray[np.int64] | None = None,
) -> Image.Image:
    """Draw which patches of an image were kept.

    Dropped patches are dimmed and lose their colour. A thin line surrounds the kept regions. Pixels beyond
    the last whole patch, which the vision tower does not see, count as dropped.

    Args:
        pixels: The image that the model saw, RGB, as `ImageProcessor.crop` gives it.
        keep_indices: Kept patches [K], int64, row-major in the grid, in any order.
        grid: Rows and columns of patches.

    Returns:
        RGB image, enlarged by a whole factor so that its longer side has at least 480 pixels.

    Raises:
        UsageError: The grid does not fit the image, or an index lies outside the grid.
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
    scale = -(-_LONGER_SIDE // max(pixels.size))  # ceiling; at least 1
    shown = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)

    patches = np.zeros(rows * columns, dtype=bool)
    patches[keep_indices] = True
    kept = np.zeros((shown.height, shown.width), dtype=bool)
    block = patches.reshape(rows, columns).repeat(patch_height * scale, 0).repeat(patch_width * scale, 1)
    kept[: block.shape[0], : block.shape[1]] = block

    line = max(1, min(max(shown.size) // 300, min(patch_height, patch_width) * scale // 6))
    framed = np.pad(kept, line)  # nothing is kept beyond the image, so the line also follows the border
    inner = framed[: -2 * line, line:-line] & framed[2 * line :, line:-line]
    inner &= framed[line:-line, : -2 * line] & framed[line:-line, 2 * line :]

    colour = np.array(shown)  # [H, W, 3]
    grey = np.asarray(shown.convert("L"), dtype=np.float32) * _DIMMED
    colour[~kept] = grey.astype(np.uint8)[~kept, None]
    colour[kept & ~inner] = _COLOUR
    return Image.fromarray(colour)


def overlay_tiled(
    image: Image.Image,
    tiling: Tiling,
    processor: ImageProcessor,
    keep_indices: NDArray[np.int64],
    *,
    tiled: bool = True,
    merged: NDArray[np.int64] | None = None,
) -> Image.Image:
    """Draw which patches of a tiled image were kept: left in the whole image, right in its tiles.

    The tiles are put together, without their padding and without the pixels beyond their last whole patch. If
    their features were resampled, the patches of the smaller grid are drawn.

    Args:
        image: RGB, as `images.decode` gives it.
        tiling: Tiling of the model.
        processor: Image processor of the model.
        keep_indices: Kept tokens [K], int64, as tile * N + slot of an `Arrangement`, in any order.
        tiled: As for `arrange`.

    Returns:
        RGB image. Both parts have the same height, unless the right one is a long strip. If the image has
        no patches in tiles, there is only the left part.

    Raises:
        InputError: As for `views`.
        UnsupportedError: As for `views`.
        UsageError: An index belongs to no visual token of this image.
    """
    arrangement = arrange((image.height, image.width), tiling, tiled=tiled)
    slots = arrangement.places.reshape(-1)
    inside = keep_indices[(keep_indices >= 0) & (keep_indices < slots.size)]
    places, end = slots[inside], tiling.side**2
    if len(inside) < len(keep_indices) or (places < 0).any():
        raise UsageError(
            f"A kept index stands for none of the {arrangement.visual_tokens} visual tokens of a picture of "
            f"{image.width} x {image.height} pixels.",
            "Pass the keep_indices of this picture.",
        )
    whole, *tiles = views(image, tiling, processor, tiled=tiled)
    drawn = overlay(whole, places[places < end], (tiling.side, tiling.side))
    if 0 in arrangement.grid:
        return drawn
    row, column = np.divmod(places[places >= end] - end, arrangement.grid[1] + 1)  # a row ends in a newline
    canvas = _canvas(tiles, (image.height, image.width), tiling, arrangement.grid)
    return _side_by_side(drawn, overlay(canvas, row * arrangement.grid[1] + column, arrangement.grid))


def _canvas(
    tiles: list[Image.Image], size: tuple[int, int], tiling: Tiling, grid: tuple[int, int]
) -> Image.Image:
    """Put the patches of the tiles together, scaled so that each cell of the grid has whole pixels."""
    patch = tiling.tile_size // tiling.side
    edge = patch * tiling.side  # without the pixels that are in no patch
    height, width = (length // tiling.tile_size for length in best_pinpoint(size, tiling))
    canvas = Image.new("RGB", (width * edge, height * edge))
    for index, tile in enumerate(tiles):
        canvas.paste(tile.crop((0, 0, edge, edge)), (index % width * edge, index // width * edge))
    seen = window(size, tiling)
    left, top = seen.left * patch, seen.top * patch
    canvas = canvas.crop((left, top, left + seen.columns * patch, top + seen.rows * patch))
    cell = (-(-canvas.width // grid[1]), -(-canvas.height // grid[0]))  # ceiling
    return canvas.resize((cell[0] * grid[1], cell[1] * grid[0]))


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two images side by side, scaled to one height."""
    height = min(max(left.height, right.height), _TALLEST)
    parts = [ImageOps.contain(part, (_WIDEST * height, height)) for part in (left, right)]
    both = Image.new("RGB", (parts[0].width + _GAP + parts[1].width, height))
    both.paste(parts[0])
    both.paste(parts[1], (parts[0].width + _GAP, (height - parts[1].height) // 2))
    return both
