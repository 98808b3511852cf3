"""Uniform: every (N / K)-th token in reading order, a baseline that covers the whole picture.

kept[i] = floor((i + 1/2) N / K),  i = 0 .. K - 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import Budget
from visprune.pruning.base import Layout
from visprune.pruning.select import last, top_indices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Uniform"]


@dataclass(frozen=True, slots=True)
class Uniform:
    """Keep evenly spaced tokens."""

    place: ClassVar[str] = "before the LLM"
    paper: ClassVar[str] = "baseline"
    positions: ClassVar[Literal["contiguous"]] = "contiguous"

    @property
    def signals(self) -> tuple[str, ...]:
        """None."""
        return ()

    def budget(self, layout: Layout) -> Budget:
        """Counts single tokens."""
        return Budget(layout.visual_tokens)

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """None."""
        return {}

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """[T, K]: the same evenly spaced tokens for each tile; integers throughout, so exact."""
        import torch

        if valid is not None:
            return _among(valid, keep_tokens)
        step = torch.arange(keep_tokens)
        # `//` for numbers that are not negative, whose graph would compare bools, which TensorRT 10.3 cannot.
        kept = torch.div((2 * step + 1) * layout.visual_tokens, 2 * keep_tokens, rounding_mode="trunc")
        return kept.unsqueeze(0).expand(features.shape[0], -1)


def _among(valid: Tensor, keep_tokens: int) -> Tensor:
    """The same rule for the V tokens of a tile with padding: [T, K]; all V of them, and padding, if V < K.

    The token of rank r is kept where some i has floor((i + 1/2) V / K) = r, so where more i end at r than
    at r - 1; and K (r + 1) / V - 1/2, rounded up, of them end at r.
    """
    rank = valid.float().cumsum(dim=-1) - 1  # [T, N], of the tokens
    total = valid.float().sum(dim=-1, keepdim=True)  # [T, 1]

    def ended(rank: Tensor) -> Tensor:
        return ((2 * keep_tokens * (rank + 1) - total) / (2 * total)).ceil()

    chosen = (ended(rank) > ended(rank - 1)).float()
    return top_indices(last(chosen, valid), keep_tokens)
