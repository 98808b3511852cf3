"""PyramidDrop: drop a share of the visual tokens before each later stage of layers (arXiv 2410.17247).

Inside the LLM. The L layers are divided into `stages` equal parts. Before the first layer l of each part
except the first one (l = 8, 16, 24 of 32), visual tokens are ranked with that layer's own projections:

    score[j] = mean over heads of softmax(q_last k_j / sqrt(Dh))     q_last: the last prompt token

By default the best half stays at each drop: 0.5, then 0.25, then 0.125 of N. Kept tokens are numbered anew
after each drop. Another ratio is reached in equal steps: for r left after P drops, each drop keeps r^(1/P).

The score needs one query and no square matrix, so it is the cheapest there is. Its price is that the query
and key weights of the scoring layer are in two graphs. In a later turn of a conversation, the softmax runs
over the new tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import LayerBudget
from visprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PyramidDrop"]


@dataclass(frozen=True, slots=True)
class PyramidDrop:
    """Drop in stages what the last prompt token attends to least.

    Attributes:
        stages: Number of parts of the decoder, with one drop between each and the next.
    """

    place: ClassVar[str] = "inside the LLM"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    positions: ClassVar[Literal["renumbered"]] = "renumbered"
    boundary: ClassVar[Literal["layer"]] = "layer"
    rows: ClassVar[Literal["last"]] = "last"
    heads: ClassVar[Literal["mean"]] = "mean"

    stages: int = 4

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise UsageError(
                f"PyramidDrop with {self.stages} stages drops nothing.", "Give stages of at least 2."
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the last layer of each stage except the last stage.

        Raises:
            UnsupportedError: The decoder has one layer.
        """
        starts = {num_layers * stage // self.stages for stage in range(1, self.stages)}
        found = tuple(start - 1 for start in sorted(starts) if start > 0)
        if not found:
            raise UnsupportedError(
                f"A decoder of {num_layers} layers has no {self.stages} stages.", "Choose another method."
            )
        return found

    def budget(self, points: int) -> LayerBudget:
        """Keep half of the tokens at each drop unless another ratio is asked for."""
        return LayerBudget(points, ratio=0.5**points)

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """Return the attention of the last token: [B, 1, S] -> [B, S]."""
        return attention[:, 0]
