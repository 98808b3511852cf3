"""Drawing of the patches of an image that pruning kept, and of those that it merged into kept tokens.

An overlay shows the image that the model saw, without the parts that were cropped away. For a tiled image
it is two images side by side: the whole image, and the tiles put together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from visprune.errors import UnsupportedError, UsageError
from visprune.manifest import Pruning
from visprune.runtime.vision.arrangement import arrange, best_pinpoint, views, window
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.pictures import PictureMaker
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.runtime.vision.sources import ImageSource
from visprune.tiling import Tiling

__all__ = ["draw_overlay", "overlay", "overlay_tiled"]

_LONGER_SIDE = 480
_COLOUR = (255, 176, 0)
_DIMMED = 0.35
_MERGED_COLOUR = (70, 160, 255)
_MERGED_TINT = np.array([0.34, 0.50, 0.70], dtype=np.float32)  # shares of the brightness, by channel

_NONE = np.array([], dtype=np.int64)

_TALLEST = 1536
_WIDEST = 4  # times the height; a longer strip is scaled down to that
_GAP = 16


def draw_overlay(
    pruning: Pruning,
    pictures: PictureMaker,
    image: ImageSource,
    keep_indices: Sequence[int],
    *,
    images: int = 1,
    merged_indices: Sequence[int] = (),
    keep_tokens: int | None = None,
) -> Image.Image:
    """Draw an image as a model saw it, with dropped patches dimmed and merged ones tinted.

    Args:
        pruning: The manifest's `pruning`.
        pictures: Maker of the model's pictures.
        image: The image.
        keep_indices: Its kept tokens, from a `Generation`.
        images: Number of images in its prompt.
        merged_indices: Patches merged into the kept tokens, from the same `Generation`.
        keep_tokens: K of the request, if it is known.

    Raises:
        UnsupportedError: The visual tokens of the model are not a grid of patches.
    """
    kept, merged = (np.array(found, dtype=np.int64) for found in (keep_indices, merged_indices))
    grid, offset = pruning.grid, pruning.grid_offset
    if pruning.resizes:
        count = keep_tokens or pictures.resized_tokens(pruning, decode(image), len(kept), images)
        pictures, side = pictures.for_tokens(pruning, count), pruning.smaller_side(count)
        grid = grid if side is None else (side, side)
    if pictures.arranged is not None:
        shown, tiled = decode(image), pictures.tiles(images)
        return overlay_tiled(shown, pictures.arranged, pictures.processor, kept, merged, tiled=tiled)
    if grid is None:
        raise UnsupportedError(
            "The visual tokens of this model are not a grid of patches.", "Leave the overlay out."
        )
    seen = pictures.seen(pictures.processor.crop(decode(image)))
    return overlay(seen, kept[kept >= 0] + offset, grid, merged + offset)


def overlay(
    pixels: Image.Image,
    keep_indices: NDArray[np.int64],
    grid: tuple[int, int],
    merged: NDArray[np.int64] = _NONE,
) -> Image.Image:
    """Draw which patches of an image were kept, and which were merged into tokens of other patches.

    Dropped patches are dimmed and lose their colour. Merged ones are less dark, and blue. A thin line
    surrounds the kept regions, and one of another colour the merged regions. Pixels beyond the last whole
    patch, which the vision tower does not see, count as dropped.

    Args:
        pixels: The image that the model saw, RGB, as `ImageProcessor.crop` gives it.
        keep_indices: The patches that the tokens stand for [K], int64, row-major in the grid, in any order.
        grid: Rows and columns of patches.
        merged: Patches that went into the tokens, int64.

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
    if any(
        found.size and not 0 <= found.min() <= found.max() < rows * columns
        for found in (keep_indices, merged)
    ):
        raise UsageError(
            f"A kept patch has an index outside a grid of {rows} x {columns} patches.",
            "Pass the keep_indices of one image.",
        )
    scale = -(-_LONGER_SIDE // max(pixels.size))  # ceiling; at least 1
    shown = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)
    line = max(1, min(max(shown.size) // 300, min(patch_height, patch_width) * scale // 6))

    def region(patches: NDArray[np.int64]) -> NDArray[np.bool_]:
        chosen = np.zeros(rows * columns, dtype=bool)
        chosen[patches] = True
        block = chosen.reshape(grid).repeat(patch_height * scale, 0).repeat(patch_width * scale, 1)
        return np.pad(block, ((0, shown.height - block.shape[0]), (0, shown.width - block.shape[1])))

    is_kept = region(keep_indices)
    is_merged = region(merged) & ~is_kept
    colour = np.array(shown)  # [H, W, 3]
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None]  # [H, W, 1]
    dropped = ~is_kept & ~is_merged
    colour[dropped] = np.repeat((grey * _DIMMED).astype(np.uint8), 3, axis=2)[dropped]
    colour[is_merged] = (grey * _MERGED_TINT).astype(np.uint8)[is_merged]
    colour[is_merged & _border(is_kept | is_merged, line)] = _MERGED_COLOUR
    colour[is_kept & _border(is_kept, line)] = _COLOUR
    return Image.fromarray(colour)


def _border(region: NDArray[np.bool_], line: int) -> NDArray[np.bool_]:
    """Return the pixels near the outside of a region; the image's own border is outside too."""
    framed = np.pad(region, line)
    inner = framed[: -2 * line, line:-line] & framed[2 * line :, line:-line]
    inner &= framed[line:-line, : -2 * line] & framed[line:-line, 2 * line :]
    border: NDArray[np.bool_] = region & ~inner
    return border


def overlay_tiled(
    image: Image.Image,
    tiling: Tiling,
    processor: ImageProcessor,
    keep_indices: NDArray[np.int64],
    merged: NDArray[np.int64] = _NONE,
    *,
    tiled: bool = True,
) -> Image.Image:
    """Draw which patches of a tiled image were kept or merged: left in the whole image, right in its tiles.

    The tiles are put together, without their padding and without the pixels beyond their last whole patch. If
    their features were resampled, the patches of the smaller grid are drawn.

    Args:
        image: RGB, as `images.decode` gives it.
        tiling: Tiling of the model.
        processor: Image processor of the model.
        keep_indices: Kept tokens [K], int64, as tile * N + slot of an `Arrangement`, in any order.
        merged: Tokens that went into the kept ones, numbered in the same way.
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
    if merged.size:  # of several patches, the one in the middle may lie in the padding
        merged = merged[slots.take(merged, mode="clip") >= 0]
        keep_indices = keep_indices[slots.take(keep_indices, mode="clip") >= 0]
    found = np.concatenate([keep_indices, merged])
    inside = found[(found >= 0) & (found < slots.size)]
    if len(inside) < len(found) or (slots[inside] < 0).any():
        raise UsageError(
            f"A kept index stands for none of the {arrangement.visual_tokens} visual tokens of a picture of "
            f"{image.width} x {image.height} pixels.",
            "Pass the keep_indices of this picture.",
        )
    end = tiling.side**2
    whole, *tiles = views(image, tiling, processor, tiled=tiled)
    kept, mixed = slots[keep_indices], slots[merged]
    drawn = overlay(whole, kept[kept < end], (tiling.side, tiling.side), mixed[mixed < end])
    if 0 in arrangement.grid:
        return drawn

    def in_tiles(places: NDArray[np.int64]) -> NDArray[np.int64]:
        row, column = np.divmod(places[places >= end] - end, arrangement.grid[1] + 1)  # a newline ends a row
        cells: NDArray[np.int64] = row * arrangement.grid[1] + column
        return cells

    canvas = _canvas(tiles, (image.height, image.width), tiling, arrangement.grid)
    return _side_by_side(drawn, overlay(canvas, in_tiles(kept), arrangement.grid, in_tiles(mixed)))


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
