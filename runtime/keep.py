"""How many visual tokens a request keeps, before the LLM and inside it."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.budget import Budget
from visprune.errors import UsageError
from visprune.manifest import Manifest

__all__ = ["Keep", "keep_for"]


@dataclass(frozen=True, slots=True)
class Keep:
    """A checked request.

    Attributes:
        tokens: Visual tokens of one image that reach the LLM, beside those always kept.
        layer_ratio: Fraction left after the last prune point inside the LLM; the bundle's own if None.
    """

    tokens: int
    layer_ratio: float | None = None

    def in_layers(self, manifest: Manifest, entering: int) -> tuple[int, ...]:
        """Visual tokens left after each prune point inside the LLM, of those that entered it."""
        if manifest.layer_pruning is None or not entering:
            return ()
        return manifest.layer_pruning.budget.kept(entering, self.layer_ratio)

    def describe(self, manifest: Manifest, images: int = 1) -> str:
        """The sentence every command prints. A method inside the LLM counts over all images of a prompt."""
        before, inside = manifest.pruning, manifest.layer_pruning
        sentence = before.budget.describe(self.tokens)
        sentence += f" (each of {images} images)" if images > 1 else ""
        if inside is None:
            return sentence
        entering = images * (self.tokens + before.always_kept)
        within = inside.describe(entering, self.in_layers(manifest, entering))
        return within if self.tokens == before.budget.visual_tokens else f"{sentence}; then {within}"


def keep_for(manifest: Manifest, *, ratio: float | None = None, keep_tokens: int | None = None) -> Keep:
    """What a request means for a bundle; without one, what it was exported for.

    A ratio or a count is about the method before the LLM; where there is none, about the one inside it.

    Raises:
        UsageError: Both are given, or the number cannot be reached.
    """
    if ratio is not None and keep_tokens is not None:
        raise UsageError("Both a ratio and a number of tokens to keep are given.", "Give one of them.")
    before, inside = manifest.pruning, manifest.layer_pruning
    asked = ratio is not None or keep_tokens is not None
    if asked and inside is not None and not before.budget.prunable:
        entering = before.keep_tokens + before.always_kept
        if inside.budget.is_recipe:
            raise UsageError(
                f"The bundle's {inside.method} recipe fixes what is kept; no other ratio can be had here.",
                f"Make another bundle: visprune-export MODEL --method {inside.method} --ratio R.",
            )
        if keep_tokens is not None:
            ratio = Budget(entering).from_tokens(keep_tokens) / entering
        inside.budget.kept(entering, ratio)  # checks it
        return Keep(before.keep_tokens, ratio)
    if ratio is not None:
        return Keep(before.budget.from_ratio(ratio))
    return Keep(before.keep_tokens if keep_tokens is None else before.budget.from_tokens(keep_tokens))
