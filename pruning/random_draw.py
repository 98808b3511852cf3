"""Random: a baseline that every method must beat, and that is stronger than it looks.

There is one seeded draw for each number of visual tokens, the same for every image, so that an exported graph
always gives the same tokens. A study averages over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import last, top_indices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random(TokenMethod):
    """Keep a seeded random choice of tokens.

    Attributes:
        seed: Seed of NumPy's default generator.
    """

    paper: ClassVar[str] = "baseline"

    seed: int = 0

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """Return `order` [N]: a random permutation of 0 to N - 1."""
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
        """Return the tokens with the K largest numbers of the permutation, the same for each tile, [T, K]."""
        order = signals["order"].unsqueeze(0)  # [1, N]
        if valid is not None:
            order = order.expand(features.shape[0], -1)
        return top_indices(last(order, valid), keep_tokens).expand(features.shape[0], -1)
