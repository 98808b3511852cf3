"""FoPru: focal pruning by the attention that a visual token receives (arXiv 2411.14164).

Before the LLM, from the vision layer whose output the projector takes (`vision_feature_layer`; later
layers never run). With P the softmax probabilities of that layer [H, n, n]:

    A        = mean over heads of P, without the CLS row and column
    s_key[j] = mean_i A[i, j]       attention received
    s_qry[i] = mean_j A[i, j]       attention given
    score    = the vector with the larger variance over the image

The rows of a softmax sum to one, so s_qry is almost constant, and the rule nearly always chooses s_key. So
s_key alone is the default, and needs one vector; `direction="variance"` applies the rule itself. A public
implementation scores with logits instead of probabilities: `scores="logits"`.

Rank keeps the K = floor(N r) largest scores. Row sums the scores of each row of the patch grid and keeps the
floor(side r) best rows whole. The kept indices are sorted, and their tokens are gathered, then projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import Budget
from visprune.errors import UsageError
from visprune.pruning.base import Layout, TokenMethod, square_side
from visprune.pruning.select import last, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FoPruRank", "FoPruRow"]


@dataclass(frozen=True, slots=True)
class _FoPru(TokenMethod):
    """The scores, which rank and row share.

    Attributes:
        scores: "probabilities" of the softmax, as the paper says, or the "logits" before it.
        direction: Attention "received", or by "variance" the one of received and given that varies more.
    """

    paper: ClassVar[str] = "FoPru, arXiv 2411.14164"

    scores: Literal["probabilities", "logits"] = "probabilities"
    direction: Literal["received", "variance"] = "received"

    def __post_init__(self) -> None:
        if self.scores not in ("probabilities", "logits") or self.direction not in ("received", "variance"):
            raise UsageError(
                f"FoPru has no scores={self.scores!r} with direction={self.direction!r}.",
                "Use scores 'probabilities' or 'logits', and direction 'received' or 'variance'.",
            )
        if self.scores == "logits" and self.direction == "variance":
            raise UsageError(
                "FoPru's variance rule compares probabilities, not logits.",
                "Use direction 'received' with scores 'logits'.",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The vectors that `score` reads."""
        if self.scores == "logits":
            return ("logits_received",)
        return (
            ("attention_received",)
            if self.direction == "received"
            else ("attention_received", "attention_given")
        )

    def score(self, signals: Mapping[str, Tensor]) -> Tensor:
        """Return the score of each visual token, [T, N] float32."""
        if self.scores == "logits":
            return signals["logits_received"]
        received = signals["attention_received"]
        if self.direction == "received":
            return received
        given = signals["attention_given"]
        # The choice is made for each tile, so it is a Where and not a branch: [T, 1].
        wider = received.var(dim=-1, keepdim=True) >= given.var(dim=-1, keepdim=True)
        return received.where(wider, given)


@dataclass(frozen=True, slots=True)
class FoPruRank(_FoPru):
    """Keep the tokens that receive most attention."""

    across_tiles: ClassVar[bool] = True

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of the K largest scores in order of position, [T, K]."""
        return top_indices(last(self.score(signals), valid), keep_tokens)


@dataclass(frozen=True, slots=True)
class FoPruRow(_FoPru):
    """Keep the rows of patches that receive most attention, whole."""

    def budget(self, layout: Layout) -> Budget:
        """Count whole rows.

        Raises:
            UnsupportedError: The visual tokens are not a square grid.
        """
        return Budget(layout.visual_tokens, unit="row", unit_tokens=square_side(layout, "fopru-row"))

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of the K / side best rows in order of position, [T, K]."""
        import torch

        side = self.budget(layout).unit_tokens
        score = self.score(signals)
        if valid is not None:
            score = score * valid.float()
        row_scores = score.reshape(-1, side, side).sum(dim=-1)  # [T, rows]
        filled = None if valid is None else valid.float().reshape(-1, side, side).amax(dim=-1) > 0
        kept = top_indices(last(row_scores, filled), keep_tokens // side)  # [T, kept rows]
        tokens = kept.unsqueeze(-1) * side + torch.arange(side)  # [T, kept rows, side]
        return tokens.flatten(1)
