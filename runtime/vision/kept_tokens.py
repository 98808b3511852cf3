"""How many visual tokens a request keeps, before the LLM and inside it."""

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

__all__ = ["Keep", "count_for", "keep_for"]


@dataclass(frozen=True, slots=True)
class Keep:
    """A checked request.

    Attributes:
        tokens: K, of the N visual tokens of a whole tile those that reach the LLM, beside those always kept.
            An image that is not tiled is one tile. Of an image whose tiles have padding, each tile keeps
            one number of tokens, the largest with which the tiles together keep no more than K / N of what
            they have.
        layer_ratio: Fraction left after the last prune point inside the LLM; the bundle's own if None.
    """

    tokens: int
    layer_ratio: float | None = None

    def in_layers(self, manifest: Manifest, entering: int) -> tuple[int, ...]:
        """Visual tokens left after each prune point inside the LLM, of those that entered it."""
        if manifest.layer_pruning is None or not entering:
            return ()
        return manifest.layer_pruning.budget.kept(entering, self.layer_ratio)

    def counts(self, pruning: Pruning, arrangement: Arrangement | None) -> tuple[int, int]:
        """The number that a pruner is given for one image, and the visual tokens that it keeps of it."""
        budget = pruning.budget
        if arrangement is None:
            return self.tokens, self.tokens
        target = arrangement.visual_tokens * self.tokens // budget.visual_tokens
        if budget.scope == "image":
            return max(1, target), max(1, target)
        unit = budget.unit_tokens
        found = (arrangement.places >= 0).reshape(arrangement.tiles, -1, unit).sum(axis=-1)  # [T, units]
        # The tokens of a tile are a rectangle of its grid: units have equally many, or none.
        filled, width = (found > 0).sum(axis=-1), found.max(axis=-1)  # [T]
        units = 1 + np.arange(budget.visual_tokens // unit)
        kept = (np.minimum(units[:, None], filled) * width).sum(axis=-1)  # for each number of units
        number = max(1, int(np.searchsorted(kept, target, side="right")))
        return number * unit, int(kept[number - 1])

    def sequence_length(self, pruning: Pruning, arrangement: Arrangement | None) -> int:
        """Places that one image takes in the sequence, newline tokens included."""
        return self.counts(pruning, arrangement)[1] + _extra_places(pruning, arrangement)

    def feeds(self, pruning: Pruning, picture: Picture) -> dict[str, NDArray[Any]]:
        """What the stages of one image read."""
        arrangement = picture.arrangement
        number, kept = self.counts(pruning, arrangement)
        values: dict[str, NDArray[Any]] = {
            "pixel_values": picture.pixels,
            "keep_tokens": np.array(number, dtype=np.int64),
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
        """Which tokens of an image a pruner kept, and where.

        Args:
            pruning: Of the bundle.
            arrangement: Of the image.
            keep_indices: [T, K] as the graph gives it; None where there is no pruner, which keeps everything.

        Returns:
            Tokens, ascending, and the place of each in the image's part of the sequence, both [M] int64. A
            token is its index among those of all tiles, tile * N + index.
        """
        if arrangement is None:
            tokens = np.arange(self.tokens) if keep_indices is None else keep_indices[0]
            return tokens, pruning.always_kept + np.arange(len(tokens))
        tiles, count = arrangement.places.shape
        if keep_indices is None:
            tokens = np.arange(tiles * count)
        elif pruning.budget.scope == "image":
            tokens = keep_indices[0]
        else:
            tokens = (keep_indices + count * np.arange(tiles)[:, None]).ravel()
        places = arrangement.places.ravel()[tokens]
        tokens, places = tokens[places >= 0], places[places >= 0]
        taken = np.sort(np.concatenate([places, arrangement.newline_places]))
        return tokens, np.searchsorted(taken, places)

    def describe(self, manifest: Manifest, images: int = 1) -> str:
        """The sentence every command prints. A method inside the LLM counts over all images of a prompt."""
        return self.sentence(manifest.pruning, manifest.layer_pruning, manifest.tiling, images)

    def sentence(
        self, before: Pruning, inside: LayerPruning | None, tiling: Tiling | None, images: int = 1
    ) -> str:
        """The same, where there is no manifest yet."""
        sentence = before.budget.describe(self.tokens)
        if tiling is not None:
            sentence += f" (each tile{', chosen among all' if before.budget.scope == 'image' else ''})"
        elif images > 1:
            sentence += f" (each of {images} images)"
        if inside is None:
            return sentence
        size = largest_size(tiling) if tiling else None
        entering = images * self.sequence_length(before, arrange(size, tiling) if size and tiling else None)
        within = inside.describe(entering, inside.budget.kept(entering, self.layer_ratio))
        within += f" (with a picture of {size[1]} x {size[0]} pixels)" if size else ""
        return within if self.tokens == before.budget.visual_tokens else f"{sentence}; then {within}"


def count_for(budget: Budget, keep_tokens: int, tiling: Tiling | None) -> int:
    """K for an explicit count, which is of one tile where a picture is several.

    Args:
        budget: Of the method before the LLM.
        keep_tokens: The count.
        tiling: How a picture becomes tiles; None where it is one.

    Raises:
        UsageError: The count cannot be reached. Where it may be meant of a whole picture, the count of a tile
            that comes to it is named.
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
    """What a request means for a bundle; without one, what it was exported for.

    A ratio or a count is about the method before the LLM; where there is none, about the one inside it.

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
                f"The bundle's {inside.method} recipe fixes what is kept; no other ratio can be had here.",
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
    """Places of one image's part of the sequence that no visual token takes: a CLS, newline tokens."""
    return pruning.always_kept + (0 if arrangement is None else len(arrangement.newline_places))
