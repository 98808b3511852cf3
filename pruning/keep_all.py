"""None: every visual token reaches the LLM. It is the reference of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.budget import Budget
from visprune.pruning.base import Layout, TokenMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KeepAll"]


@dataclass(frozen=True, slots=True)
class KeepAll(TokenMethod):
    """Keep all visual tokens: no pruning."""

    paper: ClassVar[str] = "baseline"

    def budget(self, layout: Layout) -> Budget:
        """Count all tokens; a ratio below 1 is refused."""
        return Budget(layout.visual_tokens, prunable=False)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return every index, [T, K] with K = N."""
        import torch

        return torch.arange(keep_tokens).unsqueeze(0).expand(features.shape[0], -1)
