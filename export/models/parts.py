"""What a checkpoint family tells the exporter: its modules, and which tokens are visual."""

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
    """The modules of a model, under names that all families share."""

    tower: PreTrainedModel
    projector: nn.Module
    language_model: PreTrainedModel
    lm_head: nn.Module
    image_newline: nn.Parameter | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """Which tokens of the tower become visual tokens.

    Attributes:
        layer_counts: For each hidden state the projector takes, the number of layers before it.
        prefix_tokens: Tokens before the patches (1 for CLIP's CLS).
        dropped_tokens: Leading tokens that the projector does not take.
        side: Patches along a side of the square image.
        image_size: Pixels along a side.
        channels: Of the image.
        tiling: How a picture becomes several such images; None where it is one.
    """

    layer_counts: tuple[int, ...]
    prefix_tokens: int
    dropped_tokens: int
    side: int
    image_size: int
    channels: int
    tiling: Tiling | None = None

    @property
    def resamples(self) -> bool:
        """Whether tokens of a large picture are mixed from several."""
        return self.tiling is not None and self.tiling.max_tiles is not None

    @property
    def always_kept(self) -> int:
        """Prefix tokens that reach the LLM whatever is pruned."""
        return max(0, self.prefix_tokens - self.dropped_tokens)

    @property
    def skipped_patches(self) -> int:
        """Leading patches that are dropped: 1 where `default` meets a tower without a CLS."""
        return max(0, self.dropped_tokens - self.prefix_tokens)

    @property
    def layout(self) -> Layout:
        """The visual tokens of one image, or of one tile."""
        count = self.side * self.side - self.skipped_patches
        grid = None if self.skipped_patches else (self.side, self.side)
        return Layout(count, grid, has_cls=self.prefix_tokens > 0)


def cache_shape(text_config: Any) -> tuple[int, int]:
    """Key-value heads and head size of a decoder, from its configuration."""
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
