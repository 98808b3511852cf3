"""SigLIP's vision tower, which has patches only and no CLS token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PREFIX_TOKENS", "embed", "layers"]

PREFIX_TOKENS = 0


def embed(tower: Any, pixel_values: Tensor) -> Tensor:
    """Return the input of the first layer: [T, 3, H, W] -> [T, patches, Dv]."""
    hidden: Tensor = tower.embeddings(pixel_values)
    return hidden


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last."""
    found: nn.ModuleList = tower.encoder.layers
    return found
