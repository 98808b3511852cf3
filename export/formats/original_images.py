"""Images and videos of a checkpoint in LLaVA's original format, in the terms of transformers' processors."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError
from visprune.export.files.small_files import shown
from visprune.export.formats.vision_towers import VisionTower

__all__ = ["image_processor", "pinpoints", "video_processor"]

_COLOURS = {
    "clip_vision_model": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip_vision_model": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
_IMAGE_CLASSES = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
_SETTINGS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
_MOST_DIGITS = 2  # of the tiles along a side; published checkpoints have at most 6 tiles


def image_processor(
    config: Mapping[str, Any], known: Mapping[str, Any], tower: VisionTower
) -> dict[str, Any]:
    """Return the settings of the image processor, in the form of a preprocessor_config.json.

    Args:
        config: Content of the original config.json.
        known: The translated configuration.
        tower: The vision tower.
    """
    vision = known["vision_config"]
    size = vision["image_size"]
    square = {"height": size, "width": size}
    colours = _COLOURS.get(vision["model_type"], _COLOURS["clip_vision_model"])
    given = {key: value for key, value in tower.image_settings.items() if key in _SETTINGS}
    given = {key: value for key, value in given.items() if value is not None}
    settings: dict[str, Any] = {
        "image_processor_type": _IMAGE_CLASSES[known["model_type"]],
        "do_resize": True,
        "resample": 3,
        **colours,
        **given,
    }
    if known["model_type"] == "llava":
        settings["do_pad"] = config.get("image_aspect_ratio") == "pad"
    else:
        settings["image_grid_pinpoints"] = known["image_grid_pinpoints"]
    crops = known["model_type"] == "llava_next" or (
        known["model_type"] == "llava" and vision["model_type"] != "siglip_vision_model"
    )
    if crops:
        return settings | {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    return settings | {"size": square, "do_center_crop": False}


def video_processor(
    config: Mapping[str, Any], known: Mapping[str, Any], tower: VisionTower
) -> dict[str, Any] | None:
    """Return the settings by which frames of a video are prepared; None if the model takes no videos here.

    Args are those of `image_processor`. Only OneVision's own arrangement is known: tokens are resized to half
    the side, and one newline ends a video.
    """
    usual = (
        config.get("mm_newline_position") in (None, "one_token")
        and config.get("mm_spatial_pool_mode") in (None, "bilinear")
        and config.get("mm_spatial_pool_stride") in (None, 2)
        and not config.get("add_faster_video")
    )
    if known["model_type"] != "llava_onevision" or not usual:
        return None
    settings = image_processor(config, known, tower)
    return {key: settings[key] for key in settings.keys() - {"image_grid_pinpoints"}}


def pinpoints(where: Path, config: Mapping[str, Any], tile: int) -> list[list[int]]:
    """Return the grid pinpoints as pairs (height, width); the original format has (width, height).

    A text is read as the original code reads it: "(1x1),...,(6x6)" counts tiles and stands for all grids
    between the two corners; any other is the list itself.

    Args:
        where: The checkpoint, for messages.
        config: Content of the original config.json.
        tile: Pixels along a side of a tile.

    Raises:
        CheckpointError: They make no sense.
    """
    given = config.get("image_grid_pinpoints")
    listed: Any = given
    if isinstance(given, str):
        corners = re.findall(r"\((\d+)x(\d+)\)", given)
        if corners and all(len(count) <= _MOST_DIGITS for one in corners for count in one):
            (left, low), (right, high) = (tuple(map(int, one)) for one in (corners[0], corners[-1]))
            counts = [(x, y) for x in range(left, right + 1) for y in range(low, high + 1)]
            listed = [[x * tile, y * tile] for x, y in counts]
        else:
            try:
                listed = ast.literal_eval(given)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                listed = None
    try:
        found = [[height, width] for width, height in listed]
        if not found or any(type(edge) is not int or edge < 1 for pair in found for edge in pair):
            raise ValueError
    except (TypeError, ValueError):
        raise CheckpointError(
            f"The grid pinpoints of {where} are {shown(given)}, and not pairs of a width and a height in "
            "pixels.",
            "Correct image_grid_pinpoints in config.json.",
        ) from None
    return found
