"""Conversion of a ratio to a count of visual tokens, for every method.

A ratio is the fraction KEPT. `Budget` counts before the LLM: for one tile (an image that is not tiled is one
tile) and in whole units, which are tokens or rows of the patch grid. `units = floor(total_units * ratio)`, at
least `minimum`. Units are never rounded up otherwise, so a budget is never exceeded. A method that makes the
square grid of patches smaller counts its side: `side = floor(whole_side * sqrt(ratio))`. `LayerBudget` counts
inside the LLM, over all visual tokens of a prompt. This module knows no method by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["Budget", "LayerBudget", "check_ratio", "check_request", "no_count"]


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is no fraction.

    Raises:
        UsageError: The ratio is outside (0, 1].
    """
    if not 0.0 < ratio <= 1.0:  # also refuses NaN
        raise UsageError(
            f"The ratio {ratio:g} is outside (0, 1].",
            "Give the fraction of visual tokens to keep, for example 0.25.",
        )


def check_request(ratio: float | None, keep_tokens: int | None) -> None:
    """Refuse a request with both a ratio and a count.

    Raises:
        UsageError: Both are given.
    """
    if ratio is not None and keep_tokens is not None:
        raise UsageError("Both a ratio and a number of tokens to keep are given.", "Give one of them.")


def no_count(method: str) -> UsageError:
    """Return the error for a count that a method inside the LLM is given on a model that tiles pictures."""
    return UsageError(
        "Pictures of this model have different numbers of visual tokens, so a count says nothing to "
        f"{method}.",
        "Give the fraction to keep with --ratio.",
    )


@dataclass(frozen=True, slots=True)
class Budget:
    """Rules by which a method before the LLM counts.

    Attributes:
        visual_tokens: N, the visual tokens of one tile before pruning.
        unit: Unit that is kept or dropped as a whole; "square" if the tokens left are a smaller square grid.
        unit_tokens: Visual tokens in one unit.
        prunable: False for a method that keeps everything.
        minimum: The fewest units that are kept.
        rounding: How `ratio` times units becomes an integer.
        scope: Where tokens compete: "image" if all tiles of an image together keep K times their number,
            "tile" if each tile keeps K.

    Raises:
        UsageError: The numbers do not describe whole units, or the tokens no square.
    """

    visual_tokens: int
    unit: Literal["token", "row", "square"] = "token"
    unit_tokens: int = 1
    prunable: bool = True
    minimum: int = 1
    rounding: Literal["floor"] = "floor"
    scope: Literal["image", "tile"] = "image"

    def __post_init__(self) -> None:
        whole = self.unit_tokens >= 1 and self.visual_tokens % self.unit_tokens == 0
        if not whole or not 1 <= self.minimum <= self.visual_tokens // self.unit_tokens:
            raise UsageError(
                f"{self.visual_tokens} visual tokens cannot be counted in {self.unit}s of {self.unit_tokens} "
                f"with at least {self.minimum} kept.",
                "Give a multiple of the unit, and a minimum within it.",
            )
        if self.unit == "square" and math.isqrt(self.visual_tokens) ** 2 != self.visual_tokens:
            raise UsageError(
                f"{self.visual_tokens} visual tokens are no square grid.", "Count single tokens."
            )

    def from_ratio(self, ratio: float) -> int:
        """Return K, the visual tokens kept of one tile, for a fraction kept in (0, 1].

        Raises:
            UsageError: The ratio is outside (0, 1], or below 1 for a method that keeps everything.
        """
        check_ratio(ratio)
        if self.unit == "square":
            side = math.floor(math.isqrt(self.visual_tokens) * math.sqrt(ratio) + 1e-9)
            return max(self.minimum, side * side)
        units = self.visual_tokens // self.unit_tokens
        # 0.29 * 100 is 28.999...: a product that should be whole counts as whole.
        kept = max(self.minimum, math.floor(units * ratio + 1e-9))
        return self._checked(kept * self.unit_tokens)

    def at_most(self, tokens: int) -> int:
        """Return the largest count that can be kept and is not above `tokens`; if none is, the smallest."""
        return self.from_ratio(tokens / self.visual_tokens)

    def from_tokens(self, keep_tokens: int) -> int:
        """Return K for an explicit count, which must be reachable exactly.

        Raises:
            UsageError: The count is below the minimum, above N, or not a whole number of units or a square.
        """
        if not self.minimum * self.unit_tokens <= keep_tokens <= self.visual_tokens:
            raise UsageError(
                f"Cannot keep {keep_tokens} of {self.visual_tokens} visual tokens.",
                f"Give a count from {self.minimum * self.unit_tokens} to {self.visual_tokens}.",
            )
        side = math.isqrt(keep_tokens)
        if self.unit == "square" and side * side != keep_tokens:
            raise UsageError(
                f"This method keeps a square grid of tokens, and {keep_tokens} is not the square of a side.",
                f"Keep {side**2} or {(side + 1) ** 2} tokens.",
            )
        if keep_tokens % self.unit_tokens:
            below = keep_tokens - keep_tokens % self.unit_tokens
            raise UsageError(
                f"This method keeps whole {self.unit}s of {self.unit_tokens} tokens, "
                f"and {keep_tokens} is not a multiple of {self.unit_tokens}.",
                f"Keep {below} or {below + self.unit_tokens} tokens.",
            )
        return self._checked(keep_tokens)

    def _checked(self, keep_tokens: int) -> int:
        if not self.prunable and keep_tokens != self.visual_tokens:
            raise UsageError(
                f"This method keeps all {self.visual_tokens} visual tokens, so it cannot keep {keep_tokens}.",
                "Leave the ratio out, or choose a method that prunes (see `visprune methods`).",
            )
        return keep_tokens

    def describe(self, keep_tokens: int) -> str:
        """Return the sentence that every command prints: 'kept 144 of 576 visual tokens, 75% removed'."""
        removed = 100.0 * (1.0 - keep_tokens / self.visual_tokens)
        return f"kept {keep_tokens} of {self.visual_tokens} visual tokens, {removed:.4g}% removed"


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """Rules by which a method inside the LLM counts the visual tokens left after each of its prune points.

    A ratio r is the fraction left after the last of P points. It is reached in equal steps: after point
    j = 1 .. P a fraction r^(j/P) is left. A recipe has fixed counts instead: `deletions` at each point, for a
    prompt with `recipe_tokens` visual tokens, scaled for prompts with another number.

    Attributes:
        points: P, the number of prune points.
        ratio: Fraction of the tokens left unless another is asked for; for a recipe, of the visual work.
        rounding: How a fraction of the tokens becomes a count, which is at least 1.
        deletions: Deletions of a recipe, one number for each point.
        recipe_tokens: Visual tokens of the prompt that `deletions` were made for; 0 without a recipe.
        scope: Tokens that a count is over: all visual tokens of a prompt.

    Raises:
        UsageError: There are no points, or the deletions leave no token.
    """

    points: int
    ratio: float
    rounding: Literal["floor", "nearest"] = "floor"
    deletions: tuple[int, ...] = ()
    recipe_tokens: int = 0
    scope: Literal["prompt"] = "prompt"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.points < 1:
            raise UsageError("There is no layer to prune at.", "Give a ratio below 1.")
        if not self.is_recipe and not self.deletions:
            return
        if len(self.deletions) != self.points or min(self.deletions) < 0:
            raise UsageError(
                f"{len(self.deletions)} deletions do not fit {self.points} prune points.",
                "Give a count of at least 0 for each point.",
            )
        if sum(self.deletions) >= self.recipe_tokens:
            raise UsageError(
                f"The recipe deletes {sum(self.deletions)} of {self.recipe_tokens} visual tokens, and one at "
                "least must be left.",
                "Fit the recipe again.",
            )

    @property
    def is_recipe(self) -> bool:
        """Whether the counts are fixed by a recipe, so that no other ratio can be asked for."""
        return self.recipe_tokens > 0

    def kept(self, tokens: int, ratio: float | None = None) -> tuple[int, ...]:
        """Return the visual tokens left after each point.

        Args:
            tokens: Visual tokens that enter the LLM.
            ratio: Fraction left after the last point; `self.ratio` if None.

        Raises:
            UsageError: The ratio is outside (0, 1], or is asked of a recipe.
        """
        if self.is_recipe:
            if ratio is not None:
                raise UsageError(
                    "A recipe fixes how many tokens each layer deletes, so it takes no other ratio.",
                    "Fit another recipe with `visprune fit`, or leave the ratio out.",
                )
            gone = [sum(self.deletions[: j + 1]) for j in range(self.points)]
            return tuple(max(1, tokens - math.floor(g * tokens / self.recipe_tokens)) for g in gone)
        wanted = self.ratio if ratio is None else ratio
        check_ratio(wanted)
        half = 0.5 if self.rounding == "nearest" else 0.0
        fractions = [wanted ** ((j + 1) / self.points) for j in range(self.points)]
        return tuple(max(1, math.floor(tokens * f + half + 1e-9)) for f in fractions)
