"""freePruner: keep pivots, and tokens that the pivots attend to in an early layer (arXiv 2411.15446).

Experimental: this is our reading. The outline is public: *pivotal* tokens are chosen by a degree of
contribution and carry the meaning; *complementary* tokens are chosen by attention patterns and carry detail;
nothing is merged. The formulas are not public, so each line below is a choice of ours.

Before the LLM, from the attention of the vision tower. With A^l the mean over heads of the probabilities of
layer l among the visual tokens, and late = the layer whose output the projector takes:

    degree      mode "mass":   d[j] = sum over i of A^late[i, j]
                mode "count":  d[j] = the number of rows i in which A^late[i, j] is an outlier: above
                               Q3 + 1.5 (Q3 - Q1) of row i, quartiles interpolated linearly
    pivots      the Kp tokens of largest d, Kp = round(pivot_share K), halves up, at least 1
    complement  c[j] = sum over pivots p of A^early[p, j], early = the layer at a third of the depth
    keep        the pivots, and the K - Kp others of largest c

Depth counts the layers up to the feature layer: a third of 23 is the seventh. Under "mass", the attention
that a patch gives counts even if the patch is no visual token (the first one, where a tower without a CLS
meets the strategy `default`). A degree that is a count has ties; the first token in reading order wins.

An export has a fixed number of pivots. `FreePruner.adaptive` lets their number depend on the image: it takes
all tokens with d above Q3 + 1.5 (Q3 - Q1) of d, or the largest if there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.errors import UsageError
from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import fence, last, part, ranks, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FreePruner"]

_MODES = ("mass", "count")
_EARLY = ("quarter", "third", "half")


@dataclass(frozen=True, slots=True)
class FreePruner(TokenMethod):
    """Keep tokens of high contribution, and tokens that they attend to in an early layer (experimental).

    Attributes:
        mode: How a token's degree is measured: by the attention it receives ("mass"), or by the number of
            rows in which it is an outlier ("count").
        pivot_share: Share of the kept tokens that is chosen by degree; in (0, 1].
        early: Depth of the layer that chooses the other tokens.
    """

    paper: ClassVar[str] = "freePruner, arXiv 2411.15446"

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
        """The signal of the late layer that the degree needs, and the attention map of the early layer."""
        late = "attention_received" if self.mode == "mass" else "attention_map"
        return (late, f"attention_map_{self.early}")

    def degree(self, signals: Mapping[str, Tensor]) -> Tensor:
        """Return the degree of each visual token, [T, N] float32; under "mass" a mean instead of a sum."""
        if self.mode == "mass":
            return signals["attention_received"]
        late = signals["attention_map"]  # [T, N, N]
        return (late > fence(late)).float().sum(dim=1)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the pivots and their complement in order of position, [T, K]."""
        degree = last(self.degree(signals), valid)
        pivots = ranks(degree) < part(keep_tokens, self.pivot_share)  # [T, N]
        return top_indices(last(self._final(pivots, signals), valid), keep_tokens)

    def adaptive(self, signals: Mapping[str, Tensor], keep_tokens: int) -> list[Tensor]:
        """Select with as many pivots as the image has. For reference only: this is not exported.

        Experimental, our reading: pivots are the outliers among the degrees, d above Q3 + 1.5 (Q3 - Q1), or
        the largest if there is none. All of them are kept, and complements fill up to K. An image with more
        than K pivots keeps more than K tokens, which a graph with a fixed K cannot.

        Args:
            signals: Values of the signals that `signals` names.
            keep_tokens: K.

        Returns:
            The kept indices of each tile, int64, ascending.
        """
        degree = self.degree(signals)
        pivots = (degree > fence(degree)) | (ranks(degree) < 1)
        final = self._final(pivots, signals)
        counts = pivots.sum(dim=-1).clamp(min=keep_tokens).tolist()
        return [top_indices(row.unsqueeze(0), count)[0] for row, count in zip(final, counts, strict=True)]

    def _final(self, pivots: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """Return scores in which every pivot is above every other token, [T, N]."""
        mask = pivots.float()
        early = signals[f"attention_map_{self.early}"]  # [T, N, N]
        looked_at = (mask.unsqueeze(1) @ early).squeeze(1)  # [T, N], at most N
        return looked_at * (1 - mask) + mask * 2 * mask.shape[-1]
