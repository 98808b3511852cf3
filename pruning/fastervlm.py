"""FasterVLM: keep the tokens that the CLS token attends to most (arXiv 2412.01818, version 1).

Before the LLM, from the vision layer whose output the projector takes. With P the softmax
probabilities of that layer [H, n, n] and c the row of the CLS token:

    score[j] = mean over heads of P[:, c, j],  over the visual tokens j

The K largest are kept. One row of the attention is enough, so the layer itself stays fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import last, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FasterVLM"]


@dataclass(frozen=True, slots=True)
class FasterVLM(TokenMethod):
    """Keep the tokens that the CLS token gives most attention to."""

    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818v1"
    across_tiles: ClassVar[bool] = True

    @property
    def signals(self) -> tuple[str, ...]:
        """The attention of the CLS token."""
        return ("cls_attention",)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of the K largest scores in order of position, [T, K]."""
        return top_indices(last(signals["cls_attention"], valid), keep_tokens)
