"""FastV: drop, in an early layer, the visual tokens that the last prompt token attends to least.

Source: arXiv 2403.06764.

Inside the LLM, with P the softmax probabilities of layer K - 1 (0-based, K = 2 by default):

    score[j] = mean over heads of P[h, last prompt token, j]

The round(N r) visual tokens with the largest scores stay, and keep their original positions. The published
form drops the others between layers K - 1 and K. Here they leave already before the MLP of layer K - 1. An
MLP treats every token by itself, so the kept tokens are computed the same, and the dropped ones skip one more
MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import LayerBudget
from visprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FastV"]


@dataclass(frozen=True, slots=True)
class FastV:
    """Drop once, early, what the last prompt token attends to least.

    Attributes:
        first_pruned_layer: K, the first layer that sees only the kept tokens.
    """

    place: ClassVar[str] = "inside the LLM"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"
    positions: ClassVar[Literal["original"]] = "original"
    boundary: ClassVar[Literal["attention"]] = "attention"
    rows: ClassVar[Literal["last"]] = "last"
    heads: ClassVar[Literal["mean"]] = "mean"

    first_pruned_layer: int = 2

    def __post_init__(self) -> None:
        if self.first_pruned_layer < 1:
            raise UsageError(
                f"FastV cannot prune before layer {self.first_pruned_layer}: the layer before it scores.",
                "Give a first_pruned_layer of at least 1.",
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layer that scores: K - 1.

        Raises:
            UnsupportedError: No layer follows it.
        """
        if self.first_pruned_layer >= num_layers:
            raise UnsupportedError(
                f"FastV prunes before layer {self.first_pruned_layer} of a decoder of {num_layers} layers.",
                "Give a smaller first_pruned_layer, or choose another method.",
            )
        return (self.first_pruned_layer - 1,)

    def budget(self, points: int) -> LayerBudget:
        """Keep half of the tokens unless another ratio is asked for, rounded to the nearest count."""
        return LayerBudget(points, ratio=0.5, rounding="nearest")

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """Return the attention of the last token: [B, 1, S] -> [B, S]."""
        return attention[:, 0]
