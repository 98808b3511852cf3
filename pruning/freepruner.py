"""freePruner: keep pivots, and tokens that the pivots attend to (arXiv 2411.15446).

Experimental: this is our reading, because no code is public. The paper selects tokens before the LLM by the
attention of the vision tower, without training and without merging: *pivotal* tokens carry the meaning,
*complementary* tokens the detail. [attested] marks what a review of the paper says; [ours] is a choice of
ours. A^l is the mean over heads [ours] of the probabilities of layer l among the patches, without the CLS
token [ours]:

    degree      r^l[i] = sum over j of A^l[j, i] - A^l[i, i]                                       [attested]
    layers      all up to the feature layer, whose output the projector takes, or their last half  [ours]
    combine     "mean": the mean over layers of r^l, each divided by its own mean                  [ours]
                "votes": the number of layers in which r^l[i] is above Q3 + 1.5 (Q3 - Q1) of r^l   [ours]
    pivots      few tokens, whose degree stays high across layers                                  [attested]
                the Kp largest, Kp = round(pivot_share K), halves up, at least 1                   [ours]
    complement  chosen by the attention pattern of the feature layer, the penultimate one          [attested]
                of the others the K - Kp with the largest sum over pivots p of A^late[p, j]        [ours]

Votes have ties; the first token in reading order wins. The attention that a patch gives counts even if the
patch is no visual token (the first one, where a tower without a CLS meets the strategy `default`).

An earlier version of this file read the paper differently: the degree was that of the feature layer alone,
the token's own share included, and the complement came from the layer at a third of the depth. That is
`FreePruner(layers="feature", complement="third")`. Depth counts the layers up to the feature layer: a third
of 23 is the seventh.

An export has a fixed number of pivots. `FreePruner.adaptive` lets their number depend on the image: it takes
all tokens whose degree is above Q3 + 1.5 (Q3 - Q1) of all degrees, or the largest if there is none.
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

_LAYERS = ("all", "half", "feature")
_COMBINE = ("mean", "votes")
_COMPLEMENT = ("feature", "half", "third", "quarter")


@dataclass(frozen=True, slots=True)
class FreePruner(TokenMethod):
    """Keep attended tokens and what they attend to (experimental).

    Attributes:
        layers: Layers whose degrees count: "all" up to the feature layer, the last "half" of these, or the
            "feature" layer alone. With "feature" a token's attention to itself is part of its degree.
        combine: How the degrees of several layers become one number: their "mean", each divided by its own
            mean over the tokens, or the number of layers in which the degree is an outlier ("votes").
        pivot_share: Share of the kept tokens that is chosen by degree; in (0, 1].
        complement: Depth of the layer whose attention chooses the other tokens.
    """

    paper: ClassVar[str] = "freePruner, arXiv 2411.15446"

    layers: Literal["all", "half", "feature"] = "all"
    combine: Literal["mean", "votes"] = "mean"
    pivot_share: float = 0.5
    complement: Literal["feature", "half", "third", "quarter"] = "feature"

    def __post_init__(self) -> None:
        known = self.layers in _LAYERS and self.combine in _COMBINE and self.complement in _COMPLEMENT
        if not known or not 0.0 < self.pivot_share <= 1.0:
            raise UsageError(
                f"freePruner has no layers={self.layers!r} with combine={self.combine!r}, "
                f"pivot_share={self.pivot_share!r} and complement={self.complement!r}.",
                f"Use layers {' or '.join(_LAYERS)}, combine {' or '.join(_COMBINE)}, pivot_share in (0, 1], "
                f"complement {' or '.join(_COMPLEMENT)}.",
            )
        if self.layers == "feature" and self.combine == "votes":
            raise UsageError(
                "freePruner has no votes of the feature layer alone.",
                "Use combine='mean', or layers 'all' or 'half'.",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The degree, and the attention map of the layer that chooses the complement."""
        alone = self.layers == "feature"
        degree = "attention_received" if alone else f"degree_{self.combine}_{self.layers}"
        chooses = "attention_map" if self.complement == "feature" else f"attention_map_{self.complement}"
        return (degree, chooses)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the pivots and their complement in order of position, [T, K]."""
        degree = last(signals[self.signals[0]], valid)
        pivots = ranks(degree) < part(keep_tokens, self.pivot_share)  # [T, N]
        return top_indices(last(self._final(pivots, signals), valid), keep_tokens)

    def adaptive(self, signals: Mapping[str, Tensor], keep_tokens: int) -> list[Tensor]:
        """Select with as many pivots as the image has. For reference only: this is not exported.

        Experimental, our reading: pivots are the outliers among the degrees, above Q3 + 1.5 (Q3 - Q1), or
        the largest if there is none. All of them are kept, and complements fill up to K. An image with more
        than K pivots keeps more than K tokens, which a graph with a fixed K cannot.

        Args:
            signals: Values of the signals that `signals` names.
            keep_tokens: K.

        Returns:
            The kept indices of each tile, int64, ascending.
        """
        degree = signals[self.signals[0]]
        pivots = (degree > fence(degree)) | (ranks(degree) < 1)
        final = self._final(pivots, signals)
        counts = pivots.sum(dim=-1).clamp(min=keep_tokens).tolist()
        return [top_indices(row.unsqueeze(0), count)[0] for row, count in zip(final, counts, strict=True)]

    def _final(self, pivots: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """Return scores in which every pivot is above every other token, [T, N]."""
        mask = pivots.float()
        looked_at = (mask.unsqueeze(1) @ signals[self.signals[1]]).squeeze(1)  # [T, N], at most N
        return looked_at * (1 - mask) + mask * 2 * mask.shape[-1]
