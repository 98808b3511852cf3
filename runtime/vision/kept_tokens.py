"""Number of visual tokens that a request keeps, before the LLM and inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.budget import Budget, check_request, no_count
from visprune.errors import UsageError
from visprune.manifest import LayerPruning, Manifest, Pruning
from visprune.runtime.vision.arrangement import Arrangement, arrange, largest_size
from visprune.runtime.vision.pictures import Picture
from visprune.tiling import Tiling

__all__ = ["Keep", "count_for", "keep_for", "merged_patches"]


@dataclass(frozen=True, slots=True)
class Keep:
    """A checked request: how many visual tokens are kept.

    Attributes:
        tokens: K, the number of visual tokens of a whole tile that reach the LLM, of N; tokens that are
            always kept come on top. An image that is not tiled is one tile. If tiles have padding, every tile
            keeps the same number of tokens: the largest with which all tiles together keep at most K / N of
            their tokens.
        layer_ratio: Fraction left after the last prune point inside the LLM; None for the bundle's own.
    """

    tokens: int
    layer_ratio: float | None = None

    def in_layers(self, manifest: Manifest, entering: int) -> tuple[int, ...]:
        """Return the number of visual tokens left after each prune point, of those that enter the LLM."""
        if manifest.layer_pruning is None or not entering:
            return ()
        return manifest.layer_pruning.budget.kept(entering, self.layer_ratio)

    def counts(self, pruning: Pruning, arrangement: Arrangement | None) -> tuple[int, int]:
        """Return the `keep_tokens` that a pruner gets for one image, and how many visual tokens it keeps."""
        budget = pruning.budget
        if arrangement is None:
            return self.tokens, self.tokens
        if budget.unit == "square":  # the arrangement is that of the smaller grid, and all of it is kept
            return self.tokens, arrangement.visual_tokens
        target = arrangement.visual_tokens * self.tokens // budget.visual_tokens
        if budget.scope == "image":
            return max(1, target), max(1, target)
        unit = budget.unit_tokens
        found = (arrangement.places >= 0).reshape(arrangement.tiles, -1, unit).sum(axis=-1)  # [T, units]
        # The tokens of a tile form a rectangle of its grid: all units that have tokens have the same number.
        filled, width = (found > 0).sum(axis=-1), found.max(axis=-1)  # [T]
        units = 1 + np.arange(budget.visual_tokens // unit)
        kept = (np.minimum(units[:, None], filled) * width).sum(axis=-1)  # by the number of units kept
        number = max(1, int(np.searchsorted(kept, target, side="right")))
        return number * unit, int(kept[number - 1])

    def sequence_length(self, pruning: Pruning, arrangement: Arrangement | None) -> int:
        """Return the number of places that one image takes in the sequence, newline tokens included."""
        return self.counts(pruning, arrangement)[1] + _extra_places(pruning, arrangement)

    def feeds(self, pruning: Pruning, picture: Picture) -> dict[str, NDArray[Any]]:
        """Return the values that the stages of one image read, by name."""
        arrangement = picture.arrangement
        number, kept = self.counts(pruning, arrangement)
        values: dict[str, NDArray[Any]] = {
            "pixel_values": picture.pixels,
            "keep_tokens": np.array(number, dtype=np.int64),
            "question_ids": np.array([picture.question], dtype=np.int64),  # [1, Q]
        }
        if arrangement is None:
            return values
        return values | {
            "token_places": arrangement.places,
            "newline_places": arrangement.newline_places,
            "image_tokens": np.array(kept + _extra_places(pruning, arrangement), dtype=np.int64),
            "token_sources": arrangement.sources,
            "token_weights": arrangement.weights,
        }

    def chosen(
        self, pruning: Pruning, arrangement: Arrangement | None, keep_indices: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of an image that a pruner kept, and their places.

        Args:
            pruning: The manifest's `pruning`.
            arrangement: Arrangement of the image.
            keep_indices: [T, K], as the graph gives it; None without a pruner, where all tokens are kept.

        Returns:
            Tokens in the order of the graph, and the place of each in the image's part of the sequence, both
            [M] int64. A token is its index among the tokens of all tiles, tile * N + index; where the image
            is made smaller, among those of the smaller tiles. -1 is a CLS token among the kept ones.
        """
        if pruning.resizes:
            keep_indices = None
        if arrangement is None:
            tokens = np.arange(self.tokens) if keep_indices is None else keep_indices[0]
            return tokens, pruning.always_kept + np.arange(len(tokens))
        tokens, places = _with_places(pruning, arrangement, keep_indices)
        tokens, places = tokens[places >= 0], places[places >= 0]
        taken = np.sort(np.concatenate([places, arrangement.newline_places]))
        return tokens, np.searchsorted(taken, places)

    def describe(self, manifest: Manifest, images: int = 1) -> str:
        """Return the sentence that commands print. A method inside the LLM counts over all images."""
        return self.sentence(manifest.pruning, manifest.layer_pruning, manifest.tiling, images)

    def sentence(
        self, before: Pruning, inside: LayerPruning | None, tiling: Tiling | None, images: int = 1
    ) -> str:
        """Return the sentence of `describe` from its parts, for code that has no manifest yet."""
        sentence = before.budget.describe(self.tokens)
        if tiling is not None:
            sentence += f" (each tile{', chosen among all' if before.budget.scope == 'image' else ''})"
        elif images > 1:
            sentence += f" (each of {images} images)"
        if inside is None:
            return sentence
        size = largest_size(tiling) if tiling else None
        arranged = before.arranged(tiling, self.tokens)
        entering = images * self.sequence_length(
            before, arrange(size, arranged) if size and arranged else None
        )
        within = inside.describe(entering, inside.budget.kept(entering, self.layer_ratio))
        within += f" (with a picture of {size[1]} x {size[0]} pixels)" if size else ""
        return within if self.tokens == before.budget.visual_tokens else f"{sentence}; then {within}"


def merged_patches(
    pruning: Pruning,
    arrangement: Arrangement | None,
    keep_indices: NDArray[np.int64],
    merge_weights: NDArray[np.float32],
    left: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Return the patches of an image that went into tokens which stand for others.

    Args:
        pruning: The manifest's `pruning`.
        arrangement: Arrangement of the image.
        keep_indices: [T, K], as the graph gives it.
        merge_weights: [T, K, N], the weight of each patch in each token.
        left: [M] bool, for each token that `Keep.chosen` returns, whether it reaches the last layer.

    Returns:
        Indices among the tokens of all tiles, ascending.
    """
    tokens, reaches = keep_indices.ravel(), left
    if arrangement is not None:
        tokens, places = _with_places(pruning, arrangement, keep_indices)
        reaches = places >= 0  # [T * K]; `left` says nothing of padding
        reaches[reaches] = left
    went_in = (merge_weights > 0) & reaches.reshape(*keep_indices.shape, 1)  # [T, K, N]
    return np.setdiff1d(np.flatnonzero(went_in.any(axis=1)), tokens[reaches])


def _with_places(
    pruning: Pruning, arrangement: Arrangement, keep_indices: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that a pruner chose in the tiles of an image, and their places, -1 for padding."""
    places = arrangement.places.ravel()
    if keep_indices is None:
        return np.arange(places.size), places
    if pruning.budget.scope == "image":
        return keep_indices[0], places[keep_indices[0]]
    tiles = np.arange(arrangement.tiles)[:, None]
    tokens = (keep_indices + pruning.budget.visual_tokens * tiles).ravel()
    # A smaller grid has a slot for each token that is kept, in the same order.
    return tokens, places if pruning.budget.unit == "square" else places[tokens]


def count_for(budget: Budget, keep_tokens: int, tiling: Tiling | None) -> int:
    """Return K for an explicit count. If images are tiled, the count is of one tile.

    Args:
        budget: Budget of the method before the LLM.
        keep_tokens: The count.
        tiling: Tiling of the model; None if images are not tiled.

    Raises:
        UsageError: The count cannot be reached. If it may be meant for a whole image, the hint names the
            count of a tile that amounts to it.
    """
    if tiling is None or keep_tokens <= budget.visual_tokens:
        return budget.from_tokens(keep_tokens)
    size = largest_size(tiling)
    whole = arrange(size, tiling).visual_tokens
    hint = f"Give a count from {budget.minimum * budget.unit_tokens} to {budget.visual_tokens}."
    if keep_tokens <= whole:
        ratio = keep_tokens / whole
        hint = (
            f"{keep_tokens:,} of the {whole:,} of a picture of {size[1]} x {size[0]} pixels are "
            f"--keep-tokens {budget.from_ratio(ratio)}, or --ratio {ratio:.4g}."
        )
    raise UsageError(
        f"Cannot keep {keep_tokens:,} tokens: a count is of one tile, which has {budget.visual_tokens:,} "
        "visual tokens.",
        hint,
    )


def keep_for(manifest: Manifest, *, ratio: float | None = None, keep_tokens: int | None = None) -> Keep:
    """Check a ratio or a count for a bundle, and return how many tokens are kept.

    The ratio or count applies to the method before the LLM, or to the method inside it if there is no other.
    Without either, the result is the one that the bundle was exported for.

    Raises:
        UsageError: Both are given, or the number cannot be reached.
    """
    check_request(ratio, keep_tokens)
    before, inside = manifest.pruning, manifest.layer_pruning
    asked = ratio is not None or keep_tokens is not None
    if asked and inside is not None and not before.budget.prunable:
        entering = before.keep_tokens + before.always_kept
        if inside.budget.is_recipe:
            raise UsageError(
                f"The bundle's {inside.method} recipe fixes what is kept, so no other ratio can be chosen.",
                f"Make another bundle: visprune-export MODEL --method {inside.method} --ratio R.",
            )
        if keep_tokens is not None and manifest.tiling is not None:
            raise no_count(inside.method)
        if keep_tokens is not None:
            ratio = Budget(entering).from_tokens(keep_tokens) / entering
        inside.budget.kept(entering, ratio)  # checks it
        return Keep(before.keep_tokens, ratio)
    if ratio is not None:
        return Keep(before.budget.from_ratio(ratio))
    if keep_tokens is None:
        return Keep(before.keep_tokens)
    return Keep(count_for(before.budget, keep_tokens, manifest.tiling))


def _extra_places(pruning: Pruning, arrangement: Arrangement | None) -> int:
    """Return the number of places of one image that hold no prunable token: a CLS token, newlines."""
    return pruning.always_kept + (0 if arrangement is None else len(arrangement.newline_places))
