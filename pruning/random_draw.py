"""Random: the baseline every method must beat; it is stronger than it looks.

One seeded draw for each number of visual tokens, the same for every image, so that an exported
graph repeats itself exactly. A study averages over seeds.
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

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random:
    """Keep a seeded random choice of tokens.

    Attributes:
        seed: Of NumPy's default generator.
    """

    place: ClassVar[str] = "before the LLM"
    paper: ClassVar[str] = "baseline"
    positions: ClassVar[Literal["contiguous"]] = "contiguous"

    seed: int = 0

    @property
    def signals(self) -> tuple[str, ...]:
        """None."""
        return ()

    def budget(self, layout: Layout) -> Budget:
        """Counts single tokens."""
        return Budget(layout.visual_tokens)

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """`order` [N]: a random permutation of 0 to N - 1."""
        import numpy as np

        order = np.random.default_rng(self.seed).permutation(layout.visual_tokens)
        return {"order": order.astype(np.float32)}

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """[T, K]: the first K of the permutation, the same for each tile."""
        order = signals["order"].unsqueeze(0)  # [1, N]
        if valid is not None:
            order = order.expand(features.shape[0], -1)
        return top_indices(last(order, valid), keep_tokens).expand(features.shape[0], -1)
