"""Artificial images and prompts for the self-check, and their tokens according to transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visprune.export.models.parts import Features
from visprune.export.verify.compare import Arrays
from visprune.manifest import Manifest, Pruning
from visprune.runtime.backends.runner import to_numpy
from visprune.runtime.vision.arrangement import arrange
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture

__all__ = ["VerifySample", "verify_prompt", "verify_samples"]


@dataclass(frozen=True, slots=True)
class VerifySample:
    """One image of the self-check.

    Attributes:
        picture: The image in the form that the graphs take.
        size: Height and width in pixels before it was tiled; None if it is not tiled.
    """

    picture: Picture
    size: tuple[int, int] | None

    def inputs(self) -> dict[str, Tensor]:
        """Return the image as keyword arguments of a model of transformers."""
        pixels = torch.from_numpy(self.picture.pixels)
        if self.size is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels.unsqueeze(0), "image_sizes": torch.tensor([self.size])}

    def pruner_feeds(self, pruning: Pruning, keep: Keep) -> Arrays:
        """Return the pruner's inputs that depend on the image's size and on how many tokens are kept."""
        return {name: to_numpy(value) for name, value in keep.feeds(pruning, self.picture).items()}

    @torch.no_grad()
    def all_tokens(self, model: Any) -> Tensor:
        """Return all projected tokens of the image, in the order of the prompt, by transformers: [L, D]."""
        features: Tensor = model.get_image_features(**self.inputs()).pooler_output[0]
        return features

    def rows(self, tokens: NDArray[np.int64], always_kept: int) -> NDArray[np.int64]:
        """Return the rows of `all_tokens` that remain when some visual tokens are kept, ascending.

        Args:
            tokens: Indices of the kept visual tokens.
            always_kept: Number of prefix tokens, which are never dropped.
        """
        arrangement = self.picture.arrangement
        if arrangement is None:
            return np.concatenate([np.arange(always_kept), always_kept + tokens])
        return np.sort(np.concatenate([arrangement.places.ravel()[tokens], arrangement.newline_places]))


def verify_samples(features: Features, pruning: Pruning, keep_tokens: int) -> list[VerifySample]:
    """Return two images of smooth waves and noise, with values in the range of normalised pixels.

    If images are tiled, one is wide and one is high, and both have padding.

    Args:
        features: Which tokens are visual.
        pruning: What the method before the LLM does.
        keep_tokens: Tokens that it keeps of a tile.
    """
    edge = features.image_size
    seen = pruning.smaller_image(keep_tokens) or edge
    tiling = pruning.arranged(features.tiling, keep_tokens)
    if tiling is None:
        return [VerifySample(Picture(_pixels(features, seen, 1, seed)), None) for seed in range(2)]
    found = []
    for seed, size in enumerate([(edge * 5 // 4, edge * 2), (edge * 2, edge * 3 // 2)]):
        arrangement = arrange(size, tiling)
        pixels = _pixels(features, seen, arrangement.tiles, seed)
        found.append(VerifySample(Picture(pixels, arrangement), size))
    return found


def _pixels(features: Features, edge: int, tiles: int, seed: int) -> NDArray[np.float32]:
    """Return the pixels of an image: [T, C, edge, edge] float32."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.linspace(0, 6.28, edge)
    waves = torch.sin(line[:, None] * 2) + torch.cos(line[None, :] * 3)
    noise = torch.randn(tiles, features.channels, *waves.shape, generator=generator)
    pixels: NDArray[np.float32] = (waves * (0.5 - seed) + 0.5 * noise).numpy()
    return pixels


def verify_prompt(manifest: Manifest, lengths: Sequence[int]) -> Tensor:
    """Return a prompt of four random text tokens, then for each image its placeholders and four more: [1, S].

    Args:
        manifest: Manifest of the bundle.
        lengths: Number of placeholders of each image.
    """
    text = manifest.text
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, manifest.decoder.vocab_size, (1 + len(lengths), 4), generator=generator)
    words = torch.where(words == text.image_token_id, 1 if text.image_token_id == 0 else 0, words)
    parts = [words[0]]
    for length, line in zip(lengths, words[1:], strict=True):
        parts += [torch.full((length,), text.image_token_id), line]
    return torch.cat(parts).unsqueeze(0)
