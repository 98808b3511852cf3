"""ViP-LLaVA: LLaVA 1.5 with features of several encoder layers, and a norm before the projector's MLP.

The projector takes the hidden states of all layers in `vision_feature_layer`, side by side. The first token
is always dropped, as in transformers, so the configuration names no selection strategy.
"""

from __future__ import annotations

from typing import Any

from visprune.export.models import llava
from visprune.export.models.llava import parts
from visprune.export.models.parts import Features

__all__ = ["AUTO_CLASS", "features", "parts"]

AUTO_CLASS = "VipLlavaForConditionalGeneration"


def features(config: Any) -> Features:
    """Derive from the configuration which hidden states of the tower become visual tokens.

    Raises:
        UnsupportedError: The tower is not supported.
        CheckpointError: As for LLaVA 1.5.
    """
    return llava.features_for(config, "default")
