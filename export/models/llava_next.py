"""LLaVA-NeXT (LLaVA 1.6): images of any size are split into tiles, and a newline embedding ends each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.export.models import llava
from visprune.export.models.parts import Features, Parts
from visprune.tiling import Tiling

__all__ = ["AUTO_CLASS", "features", "parts", "tiled"]

AUTO_CLASS = "LlavaNextForConditionalGeneration"


def parts(model: Any) -> Parts:
    """Return the modules of a loaded `LlavaNextForConditionalGeneration`."""
    return replace(llava.parts(model), image_newline=model.model.image_newline)


def features(config: Any) -> Features:
    """Derive from the configuration which hidden states become visual tokens, and how images are tiled.

    Raises:
        UnsupportedError: As for LLaVA 1.5, or the tokens of a tile are not a grid of patches.
        CheckpointError: As for LLaVA 1.5, or the grid pinpoints cannot be used.
    """
    return tiled(config)


def tiled(
    config: Any,
    max_tiles: int | None = None,
    several: Literal["tiled", "whole"] = "tiled",
    frame_pooling: int | None = None,
) -> Features:
    """Return the features of LLaVA 1.5, with tiling added.

    Args:
        config: Configuration of the checkpoint.
        max_tiles: See `Tiling`.
        several: See `Tiling`.
        frame_pooling: See `Tiling`.

    Raises:
        UnsupportedError: As for LLaVA 1.5, or the tokens of a tile are not a grid of patches.
        CheckpointError: As for LLaVA 1.5, or the grid pinpoints cannot be used.
    """
    found = llava.features(config)
    if found.always_kept or found.skipped_patches:
        raise UnsupportedError(
            f"The feature strategy {config.vision_feature_select_strategy!r} of this model leaves tiles that "
            "are not a grid of patches, which transformers cannot put together either.",
            "Use 'default' with a CLIP tower and 'full' with a SigLIP tower.",
        )
    try:
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        tiling = Tiling(pinpoints, found.image_size, found.side, max_tiles, several, frame_pooling)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"The grid pinpoints {config.image_grid_pinpoints!r} are not pairs of numbers.",
            "Correct image_grid_pinpoints in config.json.",
        ) from None
    except UsageError as error:
        raise CheckpointError(error.what, "Correct image_grid_pinpoints in config.json.") from None
    return replace(found, tiling=tiling)
