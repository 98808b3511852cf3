"""Uniform: keep every (N / K)-th token in reading order, a baseline that covers the whole picture.

kept[i] = floor((i + 1/2) N / K),  i = 0 .. K - 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import evenly, last, top_indices

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
            return top_indices(last(evenly(valid, keep_tokens).float(), valid), keep_tokens)
        step = torch.arange(keep_tokens)
        # No number is negative, so this is `//`. The graph of `//` would compare bools, which TensorRT 10.3
        # cannot.
        kept = torch.div((2 * step + 1) * layout.visual_tokens, 2 * keep_tokens, rounding_mode="trunc")
        return kept.unsqueeze(0).expand(features.shape[0], -1)
