"""CLIP's vision tower, with a CLS token before the patches and a norm before the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PREFIX_TOKENS", "embed", "layers"]

PREFIX_TOKENS = 1


def embed(tower: Any, pixel_values: Tensor) -> Tensor:
    """Return the input of the first layer: [T, 3, H, W] -> [T, 1 + patches, Dv]."""
    hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixel_values))
    return hidden


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last."""
    found: nn.ModuleList = tower.encoder.layers
    return found
