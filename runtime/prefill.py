"""The result of a prefill: logits, and what became of the visual tokens of each image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from visprune.runtime.backends.runner import Ranked

__all__ = ["ImageTokens", "Prefill"]


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The visual tokens of one image in a cache.

    Attributes:
        kept: Tokens that reach the last layer; see `Generation.keep_indices`.
        merged: Patches that went into tokens which stand for other patches.
        visual_tokens: Number of tokens before pruning.
        by_layer: Number of tokens that entered each layer; empty if none are pruned inside the LLM.
    """

    kept: tuple[int, ...]
    merged: tuple[int, ...]
    visual_tokens: int
    by_layer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The result of a prefill.

    Attributes:
        logits: Logits of the last position, [V], in the model's dtype; or the backend's own array if it
            knows their largest.
        images: Tokens of the images that were fed in this call.
        earlier: Tokens of the images before them, which the cache held.
        features_cached: How many of the images had their features in the cache of pictures.
        tokens_cached: Number of tokens of the prompt that the cache held.
        timings_ms: Milliseconds of each stage, by graph.
    """

    logits: NDArray[np.floating] | Ranked
    images: tuple[ImageTokens, ...]
    earlier: tuple[ImageTokens, ...]
    features_cached: int
    tokens_cached: int
    timings_ms: dict[str, float]

    def of_all(self) -> Prefill:
        """Return this with all images of the prompt as its images."""
        return replace(self, images=(*self.earlier, *self.images), earlier=())

    @property
    def keep_indices(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens of each image that reach the last layer."""
        return tuple(image.kept for image in self.images)

    @property
    def merged_indices(self) -> tuple[tuple[int, ...], ...]:
        """Patches of each image that went into tokens which stand for other patches."""
        return tuple(image.merged for image in self.images)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the images before pruning."""
        return sum(image.visual_tokens for image in self.images)

    @property
    def layer_tokens(self) -> tuple[int, ...]:
        """Number of visual tokens that entered each layer; empty if none are pruned inside the LLM."""
        return tuple(map(sum, zip(*(image.by_layer for image in self.images), strict=True)))
