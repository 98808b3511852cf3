"""LLaVA-NeXT-Video: LLaVA-NeXT, which also takes videos, whose frames it averages before the projector."""

from __future__ import annotations

from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.models import llava, llava_next
from visprune.export.models.llava_next import parts
from visprune.export.models.parts import Features

__all__ = ["AUTO_CLASS", "features", "parts"]

AUTO_CLASS = "LlavaNextVideoForConditionalGeneration"


def features(config: Any) -> Features:
    """Derive from the configuration which hidden states become visual tokens, and how images are tiled.

    Raises:
        UnsupportedError: As for LLaVA-NeXT, or frames are pooled by another rule than the mean.
        CheckpointError: As for LLaVA-NeXT, or the pooling stride cannot be used.
    """
    if config.spatial_pool_mode != "average":
        raise UnsupportedError(
            f"The model pools the frames of a video by {config.spatial_pool_mode!r}.",
            "Only 'average' is supported, as spatial_pool_mode in config.json.",
        )
    stride, side = config.spatial_pool_stride, llava.features(config).side
    if type(stride) is not int or not 1 <= stride <= side:
        raise CheckpointError(
            f"The model averages frames of {side} x {side} patches over {stride!r} patches in a row.",
            "Correct spatial_pool_stride in config.json.",
        )
    return llava_next.tiled(config, frame_pooling=stride)
