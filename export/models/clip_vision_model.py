"""CLIP's vision tower, with a CLS token before the patches and a norm before the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visprune.export.models.positions import resampled_positions
from visprune.work import OtherWork

__all__ = ["PREFIX_TOKENS", "embed", "embed_resized", "layers", "other_work"]

PREFIX_TOKENS = 1


def embed(tower: Any, pixel_values: Tensor) -> tuple[Tensor, None]:
    """Return the input of the first layer, [T, 3, H, W] -> [T, 1 + patches, Dv], and no attention mask."""
    return tower.pre_layrnorm(tower.embeddings(pixel_values)), None


def embed_resized(tower: Any, pixel_values: Tensor) -> tuple[Tensor, None]:
    """Return the same for images of another size than the tower's: [T, 3, H, W]."""
    found = tower.embeddings
    patches = found.patch_embedding(pixel_values)  # [T, Dv, rows, columns]
    table = found.position_embedding.weight
    positions = resampled_positions(table[1:], patches.shape[2], patches.shape[3])
    first = (found.class_embedding + table[0]).expand(patches.shape[0], 1, -1)
    tokens = torch.cat([first, patches.flatten(2).transpose(1, 2) + positions], dim=1)
    return tower.pre_layrnorm(tokens), None


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last."""
    found: nn.ModuleList = tower.encoder.layers
    return found


def other_work(tower: Any, depth: int) -> OtherWork:
    """Return the work beside the patch embedding and the layers: none."""
    return OtherWork()
