"""VisionZip: keep dominant tokens, and merge the others into contextual ones (arXiv 2412.04467).

Before the LLM, from the vision layer whose output the projector takes. D of the K tokens are dominant and
C = K - D are contextual. With P the softmax probabilities of that layer [H, n, n], c the row of the CLS token
and k[h, j] the keys of token j:

    dominant    the CLS token and the D - 1 patches of largest sum over heads of P[:, c, j]
    rest        the R other tokens, in reading order
    targets     the first C of every step-th token of the rest, from its first, step = max(1, R // C)
    members     the others of the rest; each joins the target of largest cosine of m[j] = mean_h k[h, j]
    contextual  a target plus the mean of its members; without members the target alone

The LLM gets the dominant tokens, then the contextual ones, both in reading order, the CLS token first. All of
this is the definition. The following is our choice.

- D = round(dominant_share K). The default of 27/32 gives the published pairs 54 + 10, 108 + 20 and 162 + 30.
- Where the CLS token reaches the LLM anyway, or an image is several tiles, between whose rows it has no
  place, D patches are dominant, so that the count stays K.
- If K = N, all patches stay as they are, and the CLS token is left out as it is in the unpruned model.
- Equal scores rank by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.errors import UsageError
from visprune.pruning.base import Layout, Merged, TokenMethod
from visprune.pruning.select import cosines, last, part, ranks, unless_all

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VisionZip"]


@dataclass(frozen=True, slots=True)
class VisionZip(TokenMethod):
    """Keep what the CLS attends to, and merge the rest into a few.

    Attributes:
        dominant_share: Share of the K tokens that is dominant, the CLS token included; in (0, 1].
    """

    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    chained: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    dominant_share: float = 27 / 32

    def __post_init__(self) -> None:
        if not 0.0 < self.dominant_share <= 1.0:
            raise UsageError(
                f"VisionZip has no dominant_share={self.dominant_share!r}.",
                "Use a dominant_share in (0, 1].",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The attention of the CLS token, the mean keys, and the CLS token itself."""
        return ("cls_attention", "mean_keys", "cls_feature")

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Merged:
        """Return the dominant tokens, then the contextual ones."""
        import torch

        count = features.shape[1]
        dominant = part(keep_tokens, self.dominant_share)  # [1, 1]
        contextual = keep_tokens - dominant
        patches = dominant - 1 if layout.drops_cls else dominant
        attention = signals["cls_attention"]
        tokens = torch.ones_like(attention) > 0 if valid is None else valid
        is_dominant = tokens & (ranks(last(attention, valid)) < patches)  # [T, N]
        rest = tokens & ~is_dominant
        is_target = rest & _every_step(rest.float(), contextual)
        position = torch.arange(count)
        nearest = _most_alike(signals["mean_keys"], is_target).where(contextual > 0, -2)
        joined = position.where(~rest | is_target, nearest)  # [T, N]; -2 is no token

        # The tokens are in the order of these numbers: the dominant ones, the targets, all others.
        group = 2.0 - is_target.float() - 2 * is_dominant.float()
        order = group * count + position
        if layout.drops_cls:
            order = torch.cat([torch.full_like(order[:, :1], -1.0), order], dim=1)
        first = order.topk(keep_tokens, dim=-1, largest=False).values  # [T, K]
        indices = first.where(first < 0, first - count * ((first + 0.5) / count).floor()).long()

        itself = (indices.unsqueeze(2) == position).float()  # [T, K, N]
        members = (indices.unsqueeze(2) == joined.unsqueeze(1)).float() - itself
        weights = itself + members / members.sum(dim=-1, keepdim=True).clamp(min=1.0)
        made = weights @ features.float()
        if layout.drops_cls:
            made = signals["cls_feature"].unsqueeze(1).where((indices < 0).unsqueeze(2), made)
        return unless_all(Merged(made, indices, weights), features)


def _every_step(rest: Tensor, targets: Tensor) -> Tensor:
    """Return which tokens are a multiple of the step in the order of the rest, up to a number of them.

    Args:
        rest: [T, N] float32, 1.0 for the tokens of the rest, else 0.0.
        targets: C, [1, 1] float32.

    Returns:
        [T, N] bool, which says nothing of tokens outside the rest.
    """
    total = rest.sum(dim=-1, keepdim=True)  # [T, 1]
    rank = rest.cumsum(dim=-1) - 1  # [T, N], of the rest
    # Quotients of whole numbers are rounded down. The half keeps a quotient that is whole from falling below
    # it where division is not exact.
    step = ((total + 0.5) / targets.clamp(min=1.0)).floor().clamp(min=1.0)
    steps = ((rank + 0.5) / step).floor()
    return (steps * step == rank) & (steps < targets)


def _most_alike(keys: Tensor, is_target: Tensor) -> Tensor:
    """Return for each token the target whose key is most alike.

    Args:
        keys: [T, N, Dh] float32.
        is_target: [T, N] bool.

    Returns:
        [T, N] int64; 0 where there is no target.
    """
    return cosines(keys).where(is_target.unsqueeze(1), -2.0).argmax(dim=-1)
