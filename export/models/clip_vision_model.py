"""CLIP's vision tower, with a CLS token before the patches and a norm before the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visprune.work import OtherWork

__all__ = ["PREFIX_TOKENS", "embed", "layers", "other_work"]

PREFIX_TOKENS = 1


def embed(tower: Any, pixel_values: Tensor) -> tuple[Tensor, None]:
    """Return the input of the first layer, [T, 3, H, W] -> [T, 1 + patches, Dv], and no attention mask."""
    return tower.pre_layrnorm(tower.embeddings(pixel_values)), None


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last."""
    found: nn.ModuleList = tower.encoder.layers
    return found


def other_work(tower: Any, depth: int) -> OtherWork:
    """Return the work beside the patch embedding and the layers: none."""
    return OtherWork()
