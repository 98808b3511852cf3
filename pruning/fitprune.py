"""FitPrune: delete at each layer as many visual tokens as a fitted recipe says (arXiv 2409.10197).

Inside the LLM. The recipe is fitted beforehand on samples (`recipe_search.py`) and has the number of visual
tokens that each layer deletes. With P the softmax probabilities of a layer that deletes [H, n, n]:

    M        = max over heads of P
    self[j]  = sum over visual i of M[i, j]
    cross[j] = sum over text i of M[i, j]        (causal, so text before the image adds nothing)
    score[j] = self[j] * cross[j]

The tokens with the lowest scores leave after the layer's attention block and before its MLP. The layer's
cache still holds them; the caches of later layers do not. Kept tokens keep their original positions. The
definition has means where this has sums, because a common factor does not change the ranking. The sums are
float32, because their product underflows float16.

A deletion at the last layer would save nothing, because nothing follows, so none is made there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import LayerBudget
from visprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FitPrune"]


@dataclass(frozen=True, slots=True)
class FitPrune:
    """Delete at each layer as many tokens as a recipe says.

    Attributes:
        scheme: Number of tokens that each layer deletes, for a prompt with `visual_tokens` visual tokens.
        visual_tokens: Visual tokens of the samples that the recipe was fitted on.
        work: Fraction of the visual work that is left.
        recipe: A published recipe, as `published:NAME`; None for any other scheme.
        source: Where that recipe was published.
    """

    place: ClassVar[str] = "inside the LLM"
    paper: ClassVar[str] = "FitPrune, arXiv 2409.10197"
    positions: ClassVar[Literal["original"]] = "original"
    boundary: ClassVar[Literal["attention"]] = "attention"
    rows: ClassVar[Literal["all"]] = "all"
    heads: ClassVar[Literal["max"]] = "max"

    scheme: tuple[int, ...] = ()
    visual_tokens: int = 0
    work: float = 1.0
    recipe: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.scheme and (min(self.scheme) < 0 or sum(self.scheme) >= self.visual_tokens):
            raise UsageError(
                f"The scheme deletes {sum(self.scheme)} of {self.visual_tokens} visual tokens.",
                "Delete at least 0 at each layer, and leave one token.",
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that delete tokens.

        Raises:
            UnsupportedError: The recipe is for another decoder, or deletes nothing before the last layer.
        """
        if len(self.scheme) != num_layers:
            raise UnsupportedError(
                f"FitPrune's recipe has {len(self.scheme)} layers, and the decoder has {num_layers}.",
                "Fit a recipe on this model with `visprune fit`.",
            )
        found = tuple(layer for layer, count in enumerate(self.scheme[:-1]) if count)
        if not found:
            raise UnsupportedError(
                "FitPrune's recipe deletes nothing before the last layer.",
                "Fit one for a smaller ratio, or export with --method none.",
            )
        return found

    def budget(self, points: int) -> LayerBudget:
        """Return the counts of the recipe; no other ratio can be asked for."""
        deletions = tuple(count for count in self.scheme[:-1] if count)
        return LayerBudget(
            points, ratio=self.work, deletions=deletions, recipe_tokens=max(1, self.visual_tokens)
        )

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """Multiply the attention from visual tokens by the attention from text: [B, S, S] -> [B, S]."""
        visual = is_visual.to(attention.dtype).unsqueeze(1)  # [B, 1, S]
        received: Tensor = (visual @ attention) * ((1 - visual) @ attention)
        return received.squeeze(1)
