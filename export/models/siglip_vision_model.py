"""SigLIP's vision tower, which has patches only and no CLS token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visprune.export.models.positions import resampled_positions
from visprune.work import OtherWork

__all__ = ["PREFIX_TOKENS", "embed", "embed_resized", "layers", "other_work"]

PREFIX_TOKENS = 0


def embed(tower: Any, pixel_values: Tensor) -> tuple[Tensor, None]:
    """Return the input of the first layer, [T, 3, H, W] -> [T, patches, Dv], and no attention mask."""
    return tower.embeddings(pixel_values), None


def embed_resized(tower: Any, pixel_values: Tensor) -> tuple[Tensor, None]:
    """Return the same for images of another size than the tower's: [T, 3, H, W]."""
    found = tower.embeddings
    patches = found.patch_embedding(pixel_values)  # [T, Dv, rows, columns]
    table = found.position_embedding.weight
    positions = resampled_positions(table, patches.shape[2], patches.shape[3])
    return patches.flatten(2).transpose(1, 2) + positions, None


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last."""
    found: nn.ModuleList = tower.encoder.layers
    return found


def other_work(tower: Any, depth: int) -> OtherWork:
    """Return the work beside the patch embedding and the layers: none."""
    return OtherWork()
