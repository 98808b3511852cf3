"""Resize: show the model a smaller image, a baseline that many methods do not beat (arXiv 2510.07143).

Before the encoder. The image, as the tower would see it, is shrunk to a side of

    s' = floor(s sqrt(r)) patches,  at least 1,      K = s' s' of N = s s tokens

with the filter of the model's own processor. Position embeddings are interpolated to s' x s' as the tower's
own code does (bicubic). All K tokens go on. So it is the one method that also makes the vision tower cheaper.
At s' = s the model is the unpruned one. An image of several tiles has each of its tiles shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.budget import Budget
from visprune.pruning.base import Layout, TokenMethod, square_side

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Resize"]


@dataclass(frozen=True, slots=True)
class Resize(TokenMethod):
    """Shrink the image before the vision tower (baseline)."""

    place: ClassVar[str] = "before the encoder"
    paper: ClassVar[str] = "baseline, arXiv 2510.07143"
    resizes: ClassVar[bool] = True

    def budget(self, layout: Layout) -> Budget:
        """Count squares of a side.

        Raises:
            UnsupportedError: The visual tokens are not a square grid.
        """
        square_side(layout, "resize")
        return Budget(layout.visual_tokens, unit="square")

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return every index, [T, K]; `features` are those of the smaller image, [T, K, Dv]."""
        import torch

        return torch.arange(features.shape[1]).unsqueeze(0).expand(features.shape[0], -1)
