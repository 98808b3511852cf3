"""PruMerge+ with a fixed count: keep some tokens, and add to each those most like it (arXiv 2403.15388).

Before the LLM, from the vision layer whose output the projector takes. With a[j] the attention that the CLS
token gives patch j, and k[j] the key of patch j with its heads side by side:

    by attention   the Ka patches of largest a
    spaced         Ks of the V patches left, evenly spaced: of these in reading order those of rank
                   floor((i + 1/2) V / Ks),  i = 0 .. Ks - 1
    neighbours     of a kept patch, kept or not: the `neighbours` other patches of largest cosine of k
    token          x[i] + sum over its neighbours j of a[j] x[j]

The tokens stay in reading order. The definition is: centres by attention, more of them at even distances, the
neighbours by keys, and their sum, weighted by the attention and not normalised, on top of the centre. The
rest is our choice.

- The published form takes as many patches by attention as are outliers, a share p of all (above
  Q3 + 1.5 IQR), and every (1/(3 p))-th patch beside them. So the count differs from image to image, and about
  a quarter of the centres is chosen by attention. Here Ka = round(attention_share K), 0.25 by default, and
  Ks = K - Ka.
- Published code appends one more token, the weighted sum of all patches that were not kept. Here it is left
  out, and the count stays K.
- Published code reads queries and keys of the last layer, as one head. Here they are of the feature layer,
  behind which no layer is computed, and a[j] is the mean over heads of the softmax probabilities.
- If K = N, all tokens stay as they are. Equal scores rank by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visprune.errors import UsageError
from visprune.pruning.base import Layout, Merged, TokenMethod
from visprune.pruning.select import evenly, gather_tokens, last, part, ranks, top_indices, unless_all

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruMergePlus"]


@dataclass(frozen=True, slots=True)
class PruMergePlus(TokenMethod):
    """Keep some tokens, and add to each of them those most alike.

    Attributes:
        attention_share: Share of the kept tokens that is chosen by attention; in (0, 1].
        neighbours: Tokens that are added to each kept token; at least 1.
    """

    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    chained: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    attention_share: float = 0.25
    neighbours: int = 32

    def __post_init__(self) -> None:
        if not 0.0 < self.attention_share <= 1.0 or self.neighbours < 1:
            raise UsageError(
                f"PruMerge+ has no attention_share={self.attention_share!r} with "
                f"neighbours={self.neighbours!r}.",
                "Use an attention_share in (0, 1] and at least 1 neighbour.",
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The attention of the CLS token, and the keys."""
        return ("cls_attention", "keys")

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Merged:
        """Return the kept tokens with their neighbours, in order of position."""
        import torch

        attention = signals["cls_attention"]
        by_attention = part(keep_tokens, self.attention_share)  # [1, 1]
        tokens = torch.ones_like(attention) > 0 if valid is None else valid
        attended = tokens & (ranks(last(attention, valid)) < by_attention)  # [T, N]
        spaced = evenly(tokens & ~attended, keep_tokens - by_attention)
        indices = top_indices(last((attended | spaced).float(), valid), keep_tokens)  # [T, K]

        itself = indices.unsqueeze(2) == torch.arange(features.shape[1])  # [T, K, N]
        others = tokens.unsqueeze(1) & ~itself
        merged = others & self._nearest(signals["keys"], indices, others)
        weights = itself.float() + merged.float() * attention.unsqueeze(1)
        return unless_all(Merged(weights @ features.float(), indices, weights), features)

    def _nearest(self, keys: Tensor, indices: Tensor, others: Tensor) -> Tensor:
        """Return the `neighbours` tokens whose keys are most like the key of each kept token.

        Args:
            keys: [T, N, H Dh] float32.
            indices: [T, K] int64, the kept tokens.
            others: [T, K, N] bool, the tokens that may be neighbours.

        Returns:
            [T, K, N] bool, exactly `neighbours` of each row, or N - 1; among them tokens that may not be
            neighbours if there are too few that may.
        """
        import torch

        tiles, count, width = keys.shape
        wanted = max(1, min(self.neighbours, count - 1))
        unit = torch.nn.functional.normalize(keys, dim=-1)
        of_kept = gather_tokens(unit, indices, 0).reshape(tiles, -1, width)  # [T, K, H Dh]
        cosine = (of_kept @ unit.transpose(1, 2)).where(others, -2.0)  # [T, K, N]
        least = cosine.topk(wanted, dim=-1).values[..., -1:]  # [T, K, 1]
        nearer, equal = cosine > least, cosine == least
        room = wanted - nearer.float().sum(dim=-1, keepdim=True)
        return nearer | (equal & (equal.float().cumsum(dim=-1) <= room))
