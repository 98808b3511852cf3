"""The facts that each model family tells the exporter: its modules, and which of its tokens are visual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visprune.pruning.base import Layout
from visprune.tiling import Tiling

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Features", "Parts", "cache_shape"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules of a model, under names that are the same for all families.

    Attributes:
        tower: The vision tower.
        projector: The module that projects its features into the LLM's space.
        language_model: The decoder, without its head.
        lm_head: The head of the decoder.
        image_newline: The embedding that ends a row of a tiled image, [D]; None if images are not tiled.
    """

    tower: PreTrainedModel
    projector: nn.Module
    language_model: PreTrainedModel
    lm_head: nn.Module
    image_newline: nn.Parameter | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """Which tokens of the tower become visual tokens.

    Attributes:
        layer_counts: The number of layers before each hidden state that the projector takes.
        prefix_tokens: Number of tokens before the patches (1 for CLIP's CLS).
        dropped_tokens: Number of leading tokens that the projector does not take.
        side: Number of patches along a side of the square image.
        image_size: Number of pixels along a side.
        patch_size: Number of pixels along a side of a patch.
        channels: Number of channels of the image.
        tiling: How an image is split into several such square images; None if it is not split.
        resizable: Whether the tower can take smaller images.
    """

    layer_counts: tuple[int, ...]
    prefix_tokens: int
    dropped_tokens: int
    side: int
    image_size: int
    patch_size: int
    channels: int
    tiling: Tiling | None = None
    resizable: bool = True

    @property
    def resamples(self) -> bool:
        """Whether tokens of a large image, or of a video, are resampled, each from several."""
        return self.tiling is not None and self.tiling.resamples

    @property
    def pools_features(self) -> bool:
        """Whether tokens are resampled before the projector, and not after it."""
        return self.tiling is not None and self.tiling.frame_pooling is not None

    @property
    def always_kept(self) -> int:
        """Number of prefix tokens that reach the LLM; they are never pruned."""
        return max(0, self.prefix_tokens - self.dropped_tokens)

    @property
    def skipped_patches(self) -> int:
        """Number of leading patches that are dropped: 1 for `default` with a tower that has no CLS token."""
        return max(0, self.dropped_tokens - self.prefix_tokens)

    @property
    def layout(self) -> Layout:
        """The layout of the visual tokens of one image, or of one tile."""
        count = self.side * self.side - self.skipped_patches
        grid = None if self.skipped_patches else (self.side, self.side)
        drops_cls = self.tiling is None and 0 < self.prefix_tokens <= self.dropped_tokens
        return Layout(count, grid, has_cls=self.prefix_tokens > 0, drops_cls=drops_cls)


def cache_shape(text_config: Any) -> tuple[int, int]:
    """Return the number of key-value heads and the head size of a decoder, from its configuration."""
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
