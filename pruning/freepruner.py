"""freePruner: pivots, and what the pivots look at early on (arXiv 2411.15446). Experimental: our reading.

Before the LLM, from the attention of the vision tower. What is public is the outline: *pivotal* tokens are
chosen by a degree of contribution, and carry the meaning; *complementary* ones by attention patterns, and
carry detail; nothing is merged. The formulas are not public, so each line below is a choice of ours. With A^l
the mean over heads of the probabilities of layer l among the visual tokens, and late = the layer whose
output the projector takes:

    degree      mode "mass":   d[j] = sum over i of A^late[i, j]
                mode "count":  d[j] = the number of rows i in which A^late[i, j] is an outlier: above
                               Q3 + 1.5 (Q3 - Q1) of row i, quartiles interpolated linearly
    pivots      the Kp tokens of largest d, Kp = round(pivot_share K), halves up, at least 1
    complement  c[j] = sum over pivots p of A^early[p, j], early = the layer at a third of the depth
    keep        the pivots, and the K - Kp others of largest c

Depth counts the layers up to the feature layer: a third of 23 is the seventh. Under "mass" a patch that is no
visual token (the first one, where a tower without a CLS meets the strategy `default`) still looks. A degree
that is a count has ties; the first token in reading order wins.

An export has a fixed number of pivots. `FreePruner.adaptive` lets their number depend on the image:
all tokens with d above Q3 + 1.5 (Q3 - Q1) of d, and the largest where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import Budget
from visprune.errors import UsageError
from visprune.pruning.base import Layout
from visprune.pruning.select import last, part, ranks, top_indices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["FreePruner"]

_MODES = ("mass", "count")
_EARLY = ("quarter", "third", "half")


@dataclass(frozen=True, slots=True)
class FreePruner:
    """Keep tokens of high contribution, and those they look at in an early layer (experimental: our reading).

    Attributes:
        mode: What a token's degree is: the attention it receives, or how many rows it stands out in.
        pivot_share: Of the kept tokens, the share chosen by degree; in (0, 1].
        early: Depth of the layer that chooses the others.
    """

    place: ClassVar[str] = "before the LLM"
    paper: ClassVar[str] = "freePruner, arXiv 2411.15446"
    positions: ClassVar[Literal["contiguous"]] = "contiguous"

    mode: Literal["mass", "count"] = "mass"
    pivot_share: float = 0.5
    early: Literal["quarter", "third", "half"] = "third"

    def __post_init__(self) -> None:
        if self.mode not in _MODES or self.early not in _EARLY or not 0.0 < self.pivot_share <= 1.0:
            raise UsageError(
                f"freePruner has no mode={self.mode!r} with pivot_share={self.pivot_share!r} and "
                f"early={self.early!r}.",
                f"Use mode {' or '.join(_MODES)}, pivot_share in (0, 1], early {' or '.join(_EARLY)}.",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """Of the late layer what the degree needs, and the map of the early one."""
        late = "attention_received" if self.mode == "mass" else "attention_map"
        return (late, f"attention_map_{self.early}")

    def budget(self, layout: Layout) -> Budget:
        """Counts single tokens."""
        return Budget(layout.visual_tokens)

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """None."""
        return {}

    def degree(self, signals: Mapping[str, Tensor]) -> Tensor:
        """How much each visual token contributes: [T, N] float32; a mean and not a sum under "mass"."""
        if self.mode == "mass":
            return signals["attention_received"]
        late = signals["attention_map"]  # [T, N, N]
        return (late > _fence(late)).float().sum(dim=1)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """[T, K]: the pivots and their complement, in ascending order of position."""
        degree = last(self.degree(signals), valid)
        pivots = ranks(degree) < part(keep_tokens, self.pivot_share)  # [T, N]
        return top_indices(last(self._final(pivots, signals), valid), keep_tokens)

    def adaptive(self, signals: Mapping[str, Tensor], keep_tokens: int) -> list[Tensor]:
        """The kept tokens with as many pivots as the image has; the reference alone, not exported.

        Experimental, our reading: pivots are the outliers among the degrees, d above Q3 + 1.5 (Q3 - Q1), or
        the largest where there is none; all of them are kept, and complements fill up to K. An image with
        more than K pivots keeps more than K tokens, which no graph of fixed K can.

        Args:
            signals: Those of `signals`.
            keep_tokens: K.

        Returns:
            For each tile the kept indices, int64, ascending.
        """
        degree = self.degree(signals)
        pivots = (degree > _fence(degree)) | (ranks(degree) < 1)
        final = self._final(pivots, signals)
        counts = pivots.sum(dim=-1).clamp(min=keep_tokens).tolist()
        return [top_indices(row.unsqueeze(0), count)[0] for row, count in zip(final, counts, strict=True)]

    def _final(self, pivots: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """Scores that put every pivot before every other token: [T, N]."""
        mask = pivots.float()
        early = signals[f"attention_map_{self.early}"]  # [T, N, N]
        looked_at = (mask.unsqueeze(1) @ early).squeeze(1)  # [T, N], at most N
        return looked_at * (1 - mask) + mask * 2 * mask.shape[-1]


def _fence(values: Tensor) -> Tensor:
    """Q3 + 1.5 (Q3 - Q1) of the last axis, quartiles interpolated linearly: [..., N] -> [..., 1]."""
    last = values.shape[-1] - 1
    falling = values.topk(last + 1, dim=-1).values

    def quartile(below: int) -> Tensor:
        # The value at below / 4 of the way down; the place is static, so this is two slices.
        place, rest = divmod(below * last, 4)
        upper = falling[..., place : place + 1]
        return upper if not rest else upper + (falling[..., place + 1 : place + 2] - upper) * (rest / 4)

    third, first = quartile(1), quartile(3)
    return third + 1.5 * (third - first)
