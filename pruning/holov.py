"""HoloV: spread the kept tokens over the image, by how much its parts matter (arXiv 2510.02912).

Before the LLM, from the vision layer whose output the projector takes, with features before the projector.
The definition, with a[j] the attention that the CLS token gives to token j, as a mean over heads:

    crops     16 runs of consecutive tokens; the first N mod 16 crops have one token more than the others
    v[j]      variance of the cosines of token j and the n tokens of its crop, the one with itself set to 0:
              with m = their sum / (n - 1), the sum of the squares (cosine - m)^2, divided by n - 1
    token     1000 a[j] + 0.09 v[j] (mean of 1000 a) / (mean of v + 1e-6), both means over the crop
    crop      the mean of its tokens' scores
    quotas    floor(K share), share = crop's score / sum of all; what is left goes to the crops of largest
              share, one token each
    tokens    of each crop as many as its quota, those of largest a

As the rescaling lifts the mean of v to that of 1000 a, a crop's score is 1.09 times its mean attention unless
its cosines hardly vary. Token scores are therefore summed up by crop here, and never made one by one.

Ours, where the definition is silent or the count would not be met:

    overflow  a crop whose quota is larger than itself passes the surplus on to the crop of next smaller
              share; after the last comes the first
    crops     of one token have v = 0; fewer than 16 tokens make as many crops
    padding   is counted in no crop: neither in n nor in a mean

Crops of equal share, and tokens of equal attention, are ordered by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.errors import UsageError
from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import last, ranks, top_indices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HoloV"]


@dataclass(frozen=True, slots=True)
class HoloV(TokenMethod):
    """Keep what the CLS attends to, by a quota for each part.

    Attributes:
        crops: Number of parts; at least 1.
        variance_share: Weight of the variance beside the attention; at least 0.
    """

    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"

    crops: int = 16
    variance_share: float = 0.09

    def __post_init__(self) -> None:
        if self.crops < 1 or not 0.0 <= self.variance_share < float("inf"):
            raise UsageError(
                f"HoloV has no crops={self.crops!r} with variance_share={self.variance_share!r}.",
                "Use at least 1 crop and a share of at least 0; 16 and 0.09 are the published numbers.",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The attention of the CLS token."""
        return ("cls_attention",)

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of all quotas in order of position, [T, K]; `features` are [T, N, Dv]."""
        import torch

        count = features.shape[1]
        crops = min(self.crops, count)
        attention = signals["cls_attention"]  # [T, N]
        shown = torch.ones_like(attention) if valid is None else valid.float()
        present = _in_crops(shown.unsqueeze(-1), crops).squeeze(-1)  # [T, C, L]
        attention = _in_crops(attention.unsqueeze(-1), crops).squeeze(-1)
        size = present.sum(dim=-1)  # [T, C]
        score = self._scores(_in_crops(features.float(), crops), attention, present, size)
        quotas = _quotas(score, size, keep_tokens)
        order = ranks(attention.where(present > 0, -1.0).flatten(0, 1)).reshape(attention.shape)
        chosen = ((order < quotas.unsqueeze(-1)) & (present > 0)).float()
        return top_indices(last(_in_line(chosen, count), valid), keep_tokens)

    def _scores(self, features: Tensor, attention: Tensor, present: Tensor, size: Tensor) -> Tensor:
        """Return the score of each crop: [T, C, L, Dv], [T, C, L] twice, [T, C] -> [T, C]."""
        import torch

        unit = torch.nn.functional.normalize(features, dim=-1)
        index = torch.arange(features.shape[2])
        others = (index.unsqueeze(0) != index.unsqueeze(1)).float()  # 0 on the diagonal
        seen = present.unsqueeze(2)  # [T, C, 1, L]
        cosine = (unit @ unit.transpose(2, 3)) * others * seen
        most = (size - 1).clamp(min=1.0).unsqueeze(-1)  # [T, C, 1]
        mean = (cosine.sum(dim=-1) / most).unsqueeze(-1)
        variance = ((cosine - mean) * seen).square().sum(dim=-1) / most  # [T, C, L]
        tokens = size.clamp(min=1.0)
        mean_variance = (variance * present).sum(dim=-1) / tokens
        mean_attention = 1000 * (attention * present).sum(dim=-1) / tokens
        return mean_attention * (1 + self.variance_share * mean_variance / (mean_variance + 1e-6))


def _in_crops(values: Tensor, crops: int) -> Tensor:
    """Cut values of all tokens into crops, shorter ones with a zero at the end: [T, N, X] -> [T, C, L, X]."""
    import torch

    tiles, count, width = values.shape
    short, longer = divmod(count, crops)
    if not longer:
        return values.reshape(tiles, crops, short, width)
    end = longer * (short + 1)
    head = values[:, :end].reshape(tiles, longer, short + 1, width)
    tail = values[:, end:].reshape(tiles, crops - longer, short, width)
    return torch.cat([head, torch.cat([tail, torch.zeros_like(tail[:, :, :1])], dim=2)], dim=1)


def _in_line(values: Tensor, count: int) -> Tensor:
    """Undo `_in_crops`: [T, C, L] -> [T, N]."""
    import torch

    short, longer = divmod(count, values.shape[1])
    if not longer:
        return values.flatten(1)
    return torch.cat([values[:, :longer].flatten(1), values[:, longer:, :short].flatten(1)], dim=1)


def _quotas(score: Tensor, size: Tensor, keep_tokens: int) -> Tensor:
    """Return how many tokens each crop keeps, at most its size: [T, C] twice -> [T, C] whole numbers.

    They add up to K, or to all tokens if there are fewer.
    """
    import torch

    share = score / score.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    quotas = (share * keep_tokens).floor()
    order = ranks(share)
    whole = torch.full((1, 1), keep_tokens, dtype=torch.float32)
    quotas = quotas + (order < whole - quotas.sum(dim=-1, keepdim=True)).float()
    earlier = order.unsqueeze(1) < order.unsqueeze(2)  # [T, C, C], of row i the crops of larger share
    surplus = torch.zeros_like(whole)
    for _ in range(2):  # the second round gives what the last crop had too many to the first ones with room
        over = quotas - size
        before = surplus + over.unsqueeze(1).where(earlier, 0.0).sum(dim=-1)
        # A crop receives what crops before it have too many, less what they lack, since the last with room.
        after = before + over
        least = after.unsqueeze(1).where(earlier, 0.0).amin(dim=-1)
        quotas = (quotas + before - least).minimum(size)
        surplus = whole - quotas.sum(dim=-1, keepdim=True)
    return quotas
