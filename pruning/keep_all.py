"""None: every visual token reaches the LLM. The reference of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import Budget
from visprune.pruning.base import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["KeepAll"]


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep all visual tokens: no pruning."""

    place: ClassVar[str] = "before the LLM"
    paper: ClassVar[str] = "baseline"
    positions: ClassVar[Literal["contiguous"]] = "contiguous"

    @property
    def signals(self) -> tuple[str, ...]:
        """None."""
        return ()

    def budget(self, layout: Layout) -> Budget:
        """All tokens, always: a ratio below 1 is refused."""
        return Budget(layout.visual_tokens, prunable=False)

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
        """[T, K] with K = N: every index."""
        import torch

        return torch.arange(keep_tokens).unsqueeze(0).expand(features.shape[0], -1)
