"""Records of pruning in the manifest: the method before the LLM, and the method inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from visprune.budget import Budget, LayerBudget
from visprune.errors import UsageError
from visprune.tiling import Tiling

__all__ = ["LayerPruning", "Pruning", "Resizing"]


@dataclass(frozen=True, slots=True)
class Resizing:
    """The sizes of images that are made smaller before the vision tower.

    Attributes:
        image_size: Pixels along a side of an image that is not made smaller.
        patch_size: Pixels along a side of a patch.

    Raises:
        UsageError: The sizes give no patches.
    """

    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= self.image_size:
            raise UsageError(
                f"An image of {self.image_size} pixels has no patches of {self.patch_size}.",
                "Give positive numbers.",
            )


@dataclass(frozen=True, slots=True)
class Pruning:
    """The pruning before the LLM, and how it counts.

    Attributes:
        method: Name of the method in the registry.
        options: Knobs of the method, as exported.
        keep_tokens: K, the tokens kept of a tile by default; another number may be asked for at run time. An
            image that is not tiled is one tile.
        budget: How ratios become counts.
        grid: Rows and columns of patches, if the visual tokens are a whole grid.
        grid_offset: Index in the grid of visual token 0 (1 if a tower's first patch is not used).
        always_kept: Tokens of an image that are kept in addition and not counted (a CLS that a `full`
            strategy keeps). Inside the LLM they are visual tokens like the others.
        positions: How kept tokens are numbered for the LLM.
        projects_all: Whether all tokens go through the projector, and not only the kept ones.
        needs_text: Whether the choice depends on the text that comes with the image, so that the same image
            with another question keeps other tokens.
        merges: Whether a kept token may be made of several.
        resizing: How the image is made smaller before the vision tower, so that its features depend on how
            many tokens are kept; None if the tower takes one size only.
    """

    method: str
    options: dict[str, Any]
    keep_tokens: int
    budget: Budget
    grid: tuple[int, int] | None
    grid_offset: int
    always_kept: int
    positions: Literal["contiguous"]
    projects_all: bool = False
    needs_text: bool = False
    merges: bool = False
    resizing: Resizing | None = None

    @property
    def resizes(self) -> bool:
        """Whether the image is made smaller before the vision tower."""
        return self.resizing is not None

    def smaller_image(self, keep_tokens: int) -> int | None:
        """Return the pixels along a side to which an image is made smaller, if the method does that."""
        side = self.smaller_side(keep_tokens)
        return None if side is None or self.resizing is None else side * self.resizing.patch_size

    def smaller_side(self, keep_tokens: int) -> int | None:
        """Return the side of a smaller grid of tokens, if the method makes one for a number of tokens."""
        if self.budget.unit != "square" or keep_tokens == self.budget.visual_tokens:
            return None
        return math.isqrt(keep_tokens)

    def arranged(self, tiling: Tiling | None, keep_tokens: int) -> Tiling | None:
        """Return the tiling by which the tokens of an image are arranged if so many are kept of each tile."""
        side = self.smaller_side(keep_tokens)
        return tiling if tiling is None or side is None else tiling.with_side(side)


@dataclass(frozen=True, slots=True)
class LayerPruning:
    """The pruning inside the LLM, and how it counts.

    Attributes:
        method: Name of the method in the registry.
        options: Knobs of the method, as exported.
        layers: Prune points: the layers after whose attention tokens leave. The cache of such a layer holds
            all tokens that entered it; the caches of later layers hold only those left.
        boundary: Whether tokens leave before the MLP of that layer ("attention") or after it ("layer").
        positions: Whether kept tokens keep their original positions or are numbered anew.
        budget: How ratios become counts.
    """

    method: str
    options: dict[str, Any]
    layers: tuple[int, ...]
    boundary: Literal["attention", "layer"]
    positions: Literal["original", "renumbered"]
    budget: LayerBudget

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if len(self.layers) != self.budget.points or not ascending or min(self.layers, default=-1) < 0:
            raise UsageError(
                f"The prune layers {self.layers} do not fit {self.budget.points} prune points.",
                "Give one layer for each, ascending.",
            )

    def supplied(self) -> list[str]:
        """Return the names of the values that the runtime supplies for the prune points."""
        names = [f"keep_tokens.{k}" for k in range(len(self.layers))]
        renumbered = [f"position_ids.{k + 1}" for k in range(len(self.layers))]
        return names + (renumbered if self.positions == "renumbered" else [])

    def describe(self, entering: int, kept: tuple[int, ...]) -> str:
        """Return a sentence: 'kept 288 of 576 visual tokens after the attention of layer 1, 50% removed'."""
        place = f"layer{'s' if len(kept) > 1 else ''} {_listed(self.layers)}"
        if self.boundary == "attention":
            place = f"the attention of {place}"
        removed = 100.0 * (1.0 - kept[-1] / entering)
        return (
            f"kept {_listed(kept)} of {entering} visual tokens after {place}, "
            f"{removed:.4g}% removed{' in the end' if len(kept) > 1 else ''}"
        )

    def kept_by_layer(self, num_layers: int, kept: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Return the visual tokens that enter each layer.

        Args:
            num_layers: Layers of the decoder.
            kept: Tokens left after each prune point.
            tokens: Tokens that enter the LLM.
        """
        counts = (tokens, *kept)
        return tuple(counts[sum(point < i for point in self.layers)] for i in range(num_layers))


def _listed(numbers: tuple[int, ...]) -> str:
    """Join numbers for people, such as '1, 2 and 3'."""
    *some, last = map(str, numbers)
    return f"{', '.join(some)} and {last}" if some else last
