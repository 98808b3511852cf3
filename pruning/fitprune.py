"""FitPrune: delete at each layer what a fitted recipe says can go (arXiv 2409.10197).

Inside the LLM. A recipe, fitted beforehand on samples (`recipe_search.py`), says how many visual tokens
each layer deletes. With P the softmax probabilities of such a layer [H, n, n]:

    M        = max over heads of P
    self[j]  = sum over visual i of M[i, j]
    cross[j] = sum over text i of M[i, j]        (causal, so text before the image adds nothing)
    score[j] = self[j] * cross[j]

The lowest scores leave after the layer's attention block, before its MLP: its cache still holds them,
those of later layers do not. Survivors keep their original positions. The means of the definition are
sums here, as a common factor changes no ranking; they are float32, because the product underflows float16.

A deletion at the last layer would change nothing that follows, so none is made there.
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
    """Delete at each layer as many visual tokens as a fitted recipe says.

    Attributes:
        scheme: Deletions of each layer, for a prompt with `visual_tokens` visual tokens.
        visual_tokens: What the recipe was fitted on.
        work: Fraction of the visual work that is left.
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

    def __post_init__(self) -> None:
        if self.scheme and (min(self.scheme) < 0 or sum(self.scheme) >= self.visual_tokens):
            raise UsageError(
                f"The scheme deletes {sum(self.scheme)} of {self.visual_tokens} visual tokens.",
                "Delete at least 0 at each layer, and leave one token.",
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that delete.

        Raises:
            UnsupportedError: The recipe is for another decoder, or deletes nothing that matters.
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
        """The recipe's own counts; no other ratio can be had."""
        deletions = tuple(count for count in self.scheme[:-1] if count)
        return LayerBudget(
            points, ratio=self.work, deletions=deletions, recipe_tokens=max(1, self.visual_tokens)
        )

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """[B, S, S] -> [B, S]: looked at by visual tokens, times looked at by text."""
        visual = is_visual.to(attention.dtype).unsqueeze(1)  # [B, 1, S]
        received: Tensor = (visual @ attention) * ((1 - visual) @ attention)
        return received.squeeze(1)
