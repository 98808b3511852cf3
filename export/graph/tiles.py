"""The pruner of images that are split into several tiles.

The method prunes a tile as it does a single image. But tiles have padding, a token may be resampled from
several, and the kept tokens are put into the order of the whole image, with newline embeddings between its
rows. The runtime derives all of this from the image's size (`visprune.runtime.vision.arrangement`) and passes
it as index maps, so that no shape depends on data.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from visprune.export.graph.graphs import Pruner, symbolic_size
from visprune.export.models.parts import Features, Parts
from visprune.pruning.base import Merged, VisionPruner

__all__ = ["TilePruner"]

_BEHIND = 1 << 23  # a place after those of all tokens; float32 represents it exactly


class TilePruner(Pruner):
    """The pruner of tiled images: it selects, gathers, projects, resamples and reorders tokens.

    vision_features [T, N, Dv], keep_tokens [] int64, token_places [T, N] int64, newline_places [R] int64,
    image_tokens [] int64, token_sources [T, N, J] int64 and token_weights [T, N, J] float32 where tokens are
    resampled, the question, signals [T, ...] ->
    image_features [image_tokens, D], keep_indices [T, K]

    A method that makes the grid of every tile smaller leaves K tokens of each tile, in order. The maps are
    then those of an image whose tiles have so many slots: K takes the place of N.

    Args:
        parts: The model's modules.
        features: Which of its tokens are visual.
        pruner: The method that selects tokens.
        scope: With "tile" the method selects in each tile. With "image" it selects among the tokens of all
            tiles at once: keep_tokens counts the tokens of the image, and keep_indices [1, K] are
            tile * N + token.
    """

    def __init__(
        self, parts: Parts, features: Features, pruner: VisionPruner, scope: Literal["image", "tile"]
    ) -> None:
        super().__init__(parts, features, pruner)
        self.image_newline: Any = parts.image_newline
        self.scope = scope
        self.shrinks = pruner.budget(features.layout).unit == "square"
        self.resampling = ("token_sources", "token_weights") if features.resamples else ()

    def forward(
        self,
        vision_features: Tensor,
        keep_tokens: Tensor,
        token_places: Tensor,
        newline_places: Tensor,
        image_tokens: Tensor,
        resampling: list[Tensor],
        question: list[Tensor],
        signals: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Prune, project and reorder the tokens of one image."""
        tiles, count = token_places.shape
        found: tuple[Tensor, ...] = ()
        if self.shrinks:
            vision_features, found = self._shrunk(vision_features, count)
        encoded = vision_features.reshape(tiles * count, -1)
        sources, weights = self._flat_resampling(resampling)  # [T * N, J]
        if sources is not None and weights is not None:
            signals = [
                _weighted_sums(s.reshape(-1, 1), sources, weights).reshape(tiles, count) for s in signals
            ]
            if self.features.pools_features:
                encoded = _weighted_sums(encoded, sources, weights)
                sources = weights = None  # from here on, as without resampling
        places = token_places.reshape(-1)
        if self.shrinks:
            kept = self.projector(encoded)
            if sources is not None and weights is not None:
                kept = _weighted_sums(kept, sources, weights)
            return self._ordered(kept, places, newline_places, image_tokens), *found
        tokens = self.projector(encoded) if self.traits.projected else encoded
        if sources is not None and weights is not None:
            tokens = _weighted_sums(tokens, sources, weights)
        known = self.method_inputs(question, signals)
        selected = self._select(tokens.reshape(tiles, count, -1), known, keep_tokens, token_places >= 0)
        indices = selected.indices if isinstance(selected, Merged) else selected
        chosen = indices if self.scope == "image" else indices + torch.arange(tiles).unsqueeze(1) * count
        chosen = chosen.reshape(-1)  # [T * K]
        found = (indices,)
        if isinstance(selected, Merged):
            kept = selected.tokens.flatten(0, 1).to(tokens.dtype)
            kept = kept if self.traits.projected else self.projector(kept)
            found = (indices, selected.weights)
        elif self.traits.projected:
            kept = tokens.index_select(0, chosen)
        elif sources is None or weights is None:
            kept = self.projector(encoded.index_select(0, chosen))
        else:
            # LLaVA-OneVision projects tokens before it mixes them; only those needed are projected.
            picked = sources.index_select(0, chosen)  # [T * K, J]
            rows = self.projector(encoded.index_select(0, picked.reshape(-1)))
            shares = weights.index_select(0, chosen).unsqueeze(-1).to(rows.dtype)
            kept = (rows.reshape(*picked.shape, -1) * shares).sum(dim=1)
        return self._ordered(kept, places.index_select(0, chosen), newline_places, image_tokens), *found

    def _shrunk(self, features: Tensor, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tokens of the smaller grids [T, K, Dv], and what the method says of them."""
        selected = self.checked(
            self.pruner.select(features, self.method_inputs([], []), count, self.features.layout)
        )
        if isinstance(selected, Merged):
            return selected.tokens.to(features.dtype), (selected.indices, selected.weights)
        return features, (selected,)

    def _flat_resampling(self, resampling: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return token_sources and token_weights as [T * N, J], or None for both."""
        if not resampling:
            return None, None
        sources, weights = resampling
        return sources.flatten(0, 1), weights.flatten(0, 1)

    def _select(
        self, tokens: Tensor, known: dict[str, Tensor], keep_tokens: Tensor, valid: Tensor
    ) -> Tensor | Merged:
        """Return what the method selects: indices [T, K], or [1, K] if they are among all tiles' tokens."""
        layout = self.features.layout
        if self.scope == "image":
            tokens, valid = tokens.reshape(1, -1, tokens.shape[-1]), valid.reshape(1, -1)
            known = {name: value.reshape(1, -1) for name, value in known.items()}
        number = symbolic_size(keep_tokens, valid.shape[1] if self.scope == "image" else layout.visual_tokens)
        return self.checked(self.pruner.select(tokens, known, number, layout, valid))

    def _ordered(self, kept: Tensor, places: Tensor, newline_places: Tensor, image_tokens: Tensor) -> Tensor:
        """Return kept tokens and newlines in the order of their places, without padding, which sorts last."""
        newlines = self.image_newline.expand(newline_places.shape[0], -1)  # [R, D]
        rows = torch.cat([kept, newlines])
        keys = torch.cat([torch.where(places < 0, _BEHIND, places), newline_places]).float()
        count = symbolic_size(image_tokens, keys.shape[0])
        order = keys.topk(count, largest=False).indices  # ascending by place
        return rows.index_select(0, order)


def _weighted_sums(rows: Tensor, sources: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of rows: rows [T * N, X], sources [M, J], weights [M, J] -> [M, X]."""
    picked = rows.index_select(0, sources.reshape(-1)).reshape(*sources.shape, -1)  # [M, J, X]
    return (picked * weights.unsqueeze(-1).to(rows.dtype)).sum(dim=1)
