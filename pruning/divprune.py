"""DivPrune: keep the tokens that are least alike (arXiv 2503.02175).

Before the LLM, on the *projected* tokens: all N are projected, then K are chosen. With

    d(i, j) = 1 - cosine of projected tokens i and j

the picks make the smallest distance within the kept set large, greedily:

    first pick   argmax over j of min over i != j of d(i, j)
    next pick    argmax over j not picked of min over picked p of d(p, j)      K - 1 times

A graph makes the picks in a loop of K steps, each of O(N). Among equal distances the first token in reading
order wins. Two tokens that are each other's nearest tie by definition, so distances are made exactly
symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import ascending, cosines, last, repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DivPrune"]


@dataclass(frozen=True, slots=True)
class DivPrune(TokenMethod):
    """Keep the tokens that differ most from each other."""

    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    chained: ClassVar[bool] = True
    projected: ClassVar[bool] = True

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the first K picks in order of position, [T, K]; `features` are projected, [T, N, D]."""
        import torch

        tiles, count = features.shape[:2]
        cosine = cosines(features)  # [T, N, N]
        distance = 1 - (cosine + cosine.transpose(1, 2)) / 2
        position = torch.arange(count)
        itself = position.unsqueeze(0) == position.unsqueeze(1)  # [N, N]
        apart = distance.masked_fill(itself, 3.0)
        if valid is not None:
            apart = apart.masked_fill(~valid.unsqueeze(1), 3.0)
            distance = distance.masked_fill(~valid.unsqueeze(1), -0.5)
        first = last(apart.amin(dim=-1), valid).argmax(dim=-1)  # [T]
        # Distances are in [0, 2]. A token's distance to itself is set to -1, so that no token is picked
        # twice, and that to padding to -0.5, so that padding is never picked before a token.
        rows = distance.masked_fill(itself, -1.0).flatten(0, 1)  # [T * N, N]
        start = torch.arange(tiles) * count

        def pick(nearest: Tensor) -> tuple[Tensor, Tensor]:
            index = nearest.argmax(dim=-1)  # [T]
            return nearest.minimum(rows.index_select(0, index + start)), index.float()

        # This runs one step more than needed, which saves a special case for a single token.
        nearest = rows.index_select(0, first + start)  # [T, N]
        _, rest = repeat(pick, nearest, keep_tokens)  # [K, T] float32, as a Scan wants it
        order = torch.cat([first.unsqueeze(0), rest.long()]).transpose(0, 1)  # [T, K + 1]
        return ascending(order[:, :keep_tokens])
