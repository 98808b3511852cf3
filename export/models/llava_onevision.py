"""LLaVA-OneVision: like LLaVA-NeXT, but many tiles are resampled, and several images are not tiled."""

from __future__ import annotations

import re
from typing import Any

from visprune.errors import UnsupportedError
from visprune.export.models import llava_next
from visprune.export.models.llava_next import parts
from visprune.export.models.parts import Features

__all__ = ["AUTO_CLASS", "features", "parts"]

AUTO_CLASS = "LlavaOnevisionForConditionalGeneration"


def features(config: Any) -> Features:
    """Derive from the configuration which hidden states become visual tokens, and how images are tiled.

    Raises:
        UnsupportedError: As for LLaVA-NeXT, or the rule for large images is not `anyres_max_N`.
        CheckpointError: As for LLaVA-NeXT.
    """
    rule = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(config.vision_aspect_ratio))
    if rule is None:
        raise UnsupportedError(
            f"The rule for large pictures is {config.vision_aspect_ratio!r}.",
            "Only anyres_max_N is supported, as vision_aspect_ratio in config.json.",
        )
    return llava_next.tiled(config, max_tiles=int(rule[1]), several="whole")
