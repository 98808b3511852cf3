"""Pictures and prompts for the self-check, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visprune.export.models.parts import Features
from visprune.manifest import Manifest
from visprune.runtime.vision.arrangement import arrange
from visprune.runtime.vision.pictures import Picture

__all__ = ["Sample", "prompt", "samples"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture.

    Attributes:
        picture: As the graphs take it.
        size: Height and width it had before it was tiled; None where it is not tiled.
    """

    picture: Picture
    size: tuple[int, int] | None

    def inputs(self) -> dict[str, Tensor]:
        """As transformers takes it."""
        pixels = torch.from_numpy(self.picture.pixels)
        if self.size is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels.unsqueeze(0), "image_sizes": torch.tensor([self.size])}

    @torch.no_grad()
    def whole(self, model: Any) -> Tensor:
        """Every projected token in the order of the picture's sequence, by transformers: [L, D]."""
        features: Tensor = model.get_image_features(**self.inputs()).pooler_output[0]
        return features

    def rows(self, tokens: NDArray[np.int64], always_kept: int) -> NDArray[np.int64]:
        """Where in that sequence some visual tokens are, with all that is never dropped; ascending."""
        arrangement = self.picture.arrangement
        if arrangement is None:
            return np.concatenate([np.arange(always_kept), always_kept + tokens])
        return np.sort(np.concatenate([arrangement.places.ravel()[tokens], arrangement.newline_places]))


def samples(features: Features) -> list[Sample]:
    """Two pictures with structure: smooth waves and noise, in the range of normalised pixels.

    Where pictures become tiles, one is wide and one is high, both with padding.
    """
    edge, tiling = features.image_size, features.tiling
    if tiling is None:
        return [Sample(Picture(_pixels(features, 1, seed)), None) for seed in range(2)]
    found = []
    for seed, size in enumerate([(edge * 5 // 4, edge * 2), (edge * 2, edge * 3 // 2)]):
        arrangement = arrange(size, tiling)
        found.append(Sample(Picture(_pixels(features, arrangement.tiles, seed), arrangement), size))
    return found


def _pixels(features: Features, tiles: int, seed: int) -> NDArray[np.float32]:
    """[T, C, S, S] float32."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.linspace(0, 6.28, features.image_size)
    waves = torch.sin(line[:, None] * 2) + torch.cos(line[None, :] * 3)
    noise = torch.randn(tiles, features.channels, *waves.shape, generator=generator)
    pixels: NDArray[np.float32] = (waves * (0.5 - seed) + 0.5 * noise).numpy()
    return pixels


def prompt(manifest: Manifest, lengths: Sequence[int]) -> Tensor:
    """Four words, then for each image its placeholders and four more words: [1, S]."""
    text = manifest.text
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, manifest.decoder.vocab_size, (1 + len(lengths), 4), generator=generator)
    words = torch.where(words == text.image_token_id, 1 if text.image_token_id == 0 else 0, words)
    parts = [words[0]]
    for length, line in zip(lengths, words[1:], strict=True):
        parts += [torch.full((length,), text.image_token_id), line]
    return torch.cat(parts).unsqueeze(0)
