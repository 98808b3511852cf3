"""Uniform: keep every (N / K)-th token in reading order, a baseline that covers the whole picture.

kept[i] = floor((i + 1/2) N / K),  i = 0 .. K - 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import last, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Uniform"]


@dataclass(frozen=True, slots=True)
class Uniform(TokenMethod):
    """Keep evenly spaced tokens."""

    paper: ClassVar[str] = "baseline"

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the same evenly spaced tokens for each tile, [T, K]; exact, because all are integers."""
        import torch

        if valid is not None:
            return _among(valid, keep_tokens)
        step = torch.arange(keep_tokens)
        # No number is negative, so this is `//`. The graph of `//` would compare bools, which TensorRT 10.3
        # cannot.
        kept = torch.div((2 * step + 1) * layout.visual_tokens, 2 * keep_tokens, rounding_mode="trunc")
        return kept.unsqueeze(0).expand(features.shape[0], -1)


def _among(valid: Tensor, keep_tokens: int) -> Tensor:
    """Apply the rule to the V tokens of a tile with padding: [T, K].

    If V < K, all V tokens are kept, and padding fills up.

    The token of rank r is kept if some i has floor((i + 1/2) V / K) = r. The number of i whose result is at
    most r is K (r + 1) / V - 1/2, rounded up. So the token is kept if this number is larger than for rank
    r - 1.
    """
    rank = valid.float().cumsum(dim=-1) - 1  # [T, N], of the tokens
    total = valid.float().sum(dim=-1, keepdim=True)  # [T, 1]

    def at_most(rank: Tensor) -> Tensor:
        return ((2 * keep_tokens * (rank + 1) - total) / (2 * total)).ceil()

    chosen = (at_most(rank) > at_most(rank - 1)).float()
    return top_indices(last(chosen, valid), keep_tokens)
