"""The modules of LLaVA-HR's vision tower: a ConvNeXt beside a CLIP ViT, and what joins their features.

Shapes: T pictures, S pixels along a side, N = (S / 32)^2 tokens, D hidden size of the ViT, C channels of the
last stage of the ConvNeXt. The definitions are those of the paper (arXiv 2403.03003, section 3) and of its
published code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ConvNextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage

__all__ = ["Embeddings", "Layer", "SlowTower"]


class SlowTower(nn.Module):
    """The ConvNeXt without its head: pixel_values [T, 3, S, S] -> [T, C, S / 32, S / 32]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths, depths = list(config.slow_hidden_sizes), list(config.slow_depths)
        sizes = ConvNextConfig(num_channels=config.num_channels, hidden_sizes=widths, depths=depths)
        self.embeddings = ConvNextEmbeddings(sizes)
        self.stages = nn.ModuleList(
            ConvNextStage(
                sizes, widths[max(0, index - 1)], widths[index], stride=2 if index else 1, depth=depth
            )
            for index, depth in enumerate(depths)
        )
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.slow_layer_norm_eps

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the output of the last stage."""
        features: Tensor = self.embeddings(pixel_values)
        for stage in self.stages:
            features = stage(features)
        return features


class Embeddings(nn.Module):
    """The patch embedding of the ViT, on a smaller copy of the picture and without a class token.

    pixel_values [T, 3, S, S] -> [T, N, D]. The copy has as many patches along a side as the ConvNeXt has
    features.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        side, patch = config.image_size // config.patch_size, config.fast_patch_size
        self.size = side * patch
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(side * side, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Resize the picture, embed its patches and add their positions."""
        # In float32, as in the published code: float16 cannot tell apart the places between the pixels.
        smaller = functional.interpolate(
            pixel_values.float(), size=(self.size, self.size), mode="bilinear", align_corners=True
        )
        patches: Tensor = self.patch_embedding(smaller.to(pixel_values.dtype))  # [T, D, S / 32, S / 32]
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class Adapter(nn.Module):
    """The module that adds the features of the ConvNeXt to the tokens of the ViT, by a gate for each picture.

    u  = slow_proj(GELU(slow_conv(slow)))
    y' = y + fast_proj(GELU(fast_conv(y)))
    y'' = y' + tanh(gate(mean over tokens of [y', u])) u
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        fast, slow = config.hidden_size, config.slow_hidden_sizes[-1]
        self.slow_conv = nn.Conv2d(slow, slow, 1)
        self.slow_proj = nn.Conv2d(slow, fast, 1)
        self.fast_conv = nn.Conv2d(fast, fast, 7, padding=3, groups=fast)
        self.fast_proj = nn.Conv2d(fast, fast, 1)
        self.gate = nn.Sequential(nn.Linear(2 * fast, fast // 2), nn.GELU(), nn.Linear(fast // 2, 1))

    def forward(self, hidden: Tensor, slow: Tensor) -> Tensor:
        """Return the tokens with the features added: [T, N, D], [T, C, S / 32, S / 32] -> [T, N, D]."""
        update = self.slow_proj(functional.gelu(self.slow_conv(slow)))
        update = update.flatten(2).transpose(1, 2)  # [T, N, D]
        grid = hidden.transpose(1, 2).unflatten(2, slow.shape[2:])  # [T, D, S / 32, S / 32]
        grid = grid + self.fast_proj(functional.gelu(self.fast_conv(grid)))
        hidden = grid.flatten(2).transpose(1, 2)  # [T, N, D]
        mean = torch.cat([hidden, update], dim=-1).mean(dim=1, keepdim=True)  # [T, 1, 2 D]
        adapted: Tensor = hidden + self.gate(mean).tanh() * update  # the gate is [T, 1, 1]
        return adapted


class Merge(nn.Module):
    """The sum of both towers' features, each projected to the hidden size of the ViT."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fast_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.slow_proj = nn.Linear(config.slow_hidden_sizes[-1], config.hidden_size)

    def forward(self, hidden: Tensor, slow: Tensor) -> Tensor:
        """Return the features of the picture: [T, N, D], [T, C, S / 32, S / 32] -> [T, N, D]."""
        merged: Tensor = self.fast_proj(hidden) + self.slow_proj(slow.flatten(2).transpose(1, 2))
        return merged


class Layer(nn.Module):
    """An encoder layer of the ViT, with the adapter before it or the merge after it where there is one.

    The adapters stand before the second, third and fourth quarter of the layers (6, 12 and 18 of 24, counted
    from 0), and the merge after the last layer.
    """

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        adapts = config.adapters and index in range(depth // 4, depth, depth // 4)
        self.adapter = Adapter(config) if adapts else None
        self.encoder: Any = CLIPEncoderLayer(config)
        self.merge = Merge(config) if index == depth - 1 else None

    def forward(self, hidden: Tensor, slow: Tensor) -> Tensor:
        """Run the layer: [T, N, D], [T, C, S / 32, S / 32] -> [T, N, D]."""
        if self.adapter is not None:
            hidden = self.adapter(hidden, slow)
        hidden = self.encoder(hidden, None)
        return hidden if self.merge is None else self.merge(hidden, slow)
