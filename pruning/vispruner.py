"""VisPruner: keep some tokens for their importance, and others that are no duplicates (arXiv 2412.01818v2).

Before the LLM. K tokens are kept, in two groups:

    important   the Ki tokens that the CLS token attends to most (as FasterVLM), Ki = round(important_share K)
    diverse     rounds of removal leave K - Ki of the N - Ki others. In each round,
                - the a tokens still alive are numbered 0 .. a - 1 in reading order,
                - each even token gets s = max over the odd tokens of the cosine of their vision features,
                - the d even tokens with the largest s are dropped.

The published form drops a few tokens at a time until the count is met. A graph needs a fixed number of
rounds, so here a round drops d = min(a - (K - Ki), ceil(drop_share a)), and there are as many rounds as lead
from N tokens to one; a round with nothing left to drop changes nothing. This is our reading. A smaller
`drop_share` is nearer to the published form, and costs more rounds (1/4 costs 19 for N = 576). `drop_share`
is at most 1/2, because only even tokens are dropped, and ceil(a / 2) of a tokens are even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from visprune.errors import UsageError
from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import cosines, last, part, ranks, repeat, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VisPruner"]


@dataclass(frozen=True, slots=True)
class VisPruner(TokenMethod):
    """Keep what the CLS attends to, and the least alike of the others.

    Attributes:
        important_share: Share of the kept tokens that is chosen by attention; in (0, 1].
        drop_share: The largest share of the tokens alive that a round of removal drops; in [1/100, 1/2].
    """

    paper: ClassVar[str] = "VisPruner, arXiv 2412.01818v2"
    chained: ClassVar[bool] = True

    important_share: float = 0.5
    drop_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.important_share <= 1.0 or not 0.01 <= self.drop_share <= 0.5:
            raise UsageError(
                f"VisPruner has no important_share={self.important_share!r} with "
                f"drop_share={self.drop_share!r}.",
                "Use an important_share in (0, 1] and a drop_share in [0.01, 0.5].",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The attention of the CLS token."""
        return ("cls_attention",)

    def rounds(self, tokens: int) -> int:
        """Return how many rounds of removal lead from a number of tokens to a single one."""
        share, count = self._share, 0
        while tokens > 1:
            tokens -= -(-tokens * share.numerator // share.denominator)
            count += 1
        return count

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the important and the diverse tokens in order of position, [T, K]."""
        import torch

        important = part(keep_tokens, self.important_share)  # [1, 1]
        diverse = torch.full((1, 1), keep_tokens, dtype=torch.float32) - important
        is_important = ranks(last(signals["cls_attention"], valid)) < important  # [T, N]
        cosine = cosines(features)  # [T, N, N]
        position = torch.arange(features.shape[1])
        before = (position.unsqueeze(1) < position.unsqueeze(0)).float()  # [N, N], 1 where row < column
        share = self._share

        def drop(alive: Tensor) -> tuple[Tensor, Tensor]:
            count = alive.sum(dim=-1, keepdim=True)  # [T, 1]
            half = (alive @ before) / 2
            is_odd = (alive > 0) & (half != half.floor())  # [T, N]
            nearest = cosine.where(is_odd.unsqueeze(1), -2.0).amax(dim=-1)
            nearest = nearest.where((alive > 0) & ~is_odd, -3.0)  # only even tokens go; a cosine is >= -1
            most = ((count * share.numerator + (share.denominator - 1)) / share.denominator).floor()
            dropped = ranks(nearest) < (count - diverse).minimum(most)
            return alive.masked_fill(dropped, 0.0), count

        others = ~is_important if valid is None else valid & ~is_important
        alive, _ = repeat(drop, others.float(), max(1, self.rounds(features.shape[1])))
        return top_indices(last(alive + 2 * is_important.float(), valid), keep_tokens)

    @property
    def _share(self) -> Fraction:
        return Fraction(self.drop_share).limit_denominator(100)
