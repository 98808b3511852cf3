"""Downsample: average the square grid of patches to a smaller one, a baseline (VTC-Bench, arXiv 2510.07143).

Before the LLM, in front of the projector. The S x S patches become s x s tokens by adaptive average pooling.
In each direction token i is the mean over the patches

    floor(i S / s) .. ceil((i + 1) S / s) - 1,      i = 0 .. s - 1

so that neighbouring tokens share patches where s does not divide S. A token stands for the patch in its
middle, floor((i + 1/2) S / s). With s = S all tokens stay as they are. The definition is
average pooling of the grid to a smaller one; these bins and the patch in the middle are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.budget import Budget
from visprune.pruning.base import Layout, Merged, TokenMethod, square_side

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Downsample"]


@dataclass(frozen=True, slots=True)
class Downsample(TokenMethod):
    """Average neighbouring tokens to a smaller square grid."""

    paper: ClassVar[str] = "baseline of VTC-Bench, arXiv 2510.07143"
    merges: ClassVar[bool] = True

    def budget(self, layout: Layout) -> Budget:
        """Count the side of the smaller grid.

        Raises:
            UnsupportedError: The visual tokens are not a square grid.
        """
        square_side(layout, "downsample")
        return Budget(layout.visual_tokens, unit="square")

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Merged:
        """Return the means, row by row of the smaller grid; K is the square of its side.

        `valid` is None: where an image is several tiles, the smaller grid is what has padding.
        """
        import torch

        whole = square_side(layout, "downsample")
        # The side is a tensor, because the square root of a symbol is no size. Quotients of whole numbers are
        # rounded down. The half keeps one that is whole from falling below it where division is not exact.
        side = (torch.full((1,), keep_tokens, dtype=torch.float32).sqrt() + 0.5).floor()  # [1]
        token = torch.arange(keep_tokens).float()
        row = ((token + 0.5) / side).floor()  # [K]
        column = token - row * side
        position = torch.arange(whole)

        def bins(i: Tensor) -> Tensor:
            first = ((i * whole + 0.5) / side).floor().unsqueeze(1)
            end = (((i + 1) * whole + side - 0.5) / side).floor().unsqueeze(1)
            return ((position >= first) & (position < end)).float()  # [K, S]

        def middle(i: Tensor) -> Tensor:
            return (((2 * i + 1) * whole + 0.5) / (2 * side)).floor()  # [K]

        covered = (bins(row).unsqueeze(2) * bins(column).unsqueeze(1)).flatten(1)  # [K, N]
        weights = covered / covered.sum(dim=-1, keepdim=True)
        tiles = features.shape[0]
        indices = (middle(row) * whole + middle(column)).long().unsqueeze(0).expand(tiles, -1)
        return Merged(weights @ features.float(), indices, weights.unsqueeze(0).expand(tiles, -1, -1))
