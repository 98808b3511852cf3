"""DART: keep tokens that are unlike a few pivots (arXiv 2502.11494), in its form on embeddings.

Before the LLM, on the *projected* tokens: all N are projected, then K are chosen. The published form
measures size by the keys of the LLM's second layer. This form needs no layer of the LLM. The definition:

    size           of a token, the L1 norm of its embedding
    image pivots   the 4 image tokens of largest size; they are kept
    text pivots    the 4 tokens of the question of largest size, as the LLM embeds them; for comparison alone
    picks          each pivot in turn takes those t image tokens not yet kept whose cosine to it is lowest,
                   t = trunc((K - 4) / 8)

Ours, where the definition is silent:

    turns          image pivots first, then text pivots, each kind by size, largest first
    remainder      the last pivot takes as many tokens as are missing from K, so that the count is exact
    short question the text pivots are its tokens by size, and then those again, until there are 4
    K < 4          the K image tokens of largest size

Equal sizes and equal cosines are ordered by position.
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

__all__ = ["Dart"]

_PADDING, _KEPT = -3.0, -4.0  # below every negated cosine


@dataclass(frozen=True, slots=True)
class Dart(TokenMethod):
    """Keep large tokens, and those least like them and the question.

    Attributes:
        image_pivots: Number of pivots among the image's tokens; at least 1.
        text_pivots: Number of pivots among the question's tokens; at least 1.
    """

    paper: ClassVar[str] = "DART, arXiv 2502.11494"
    chained: ClassVar[bool] = True
    projected: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.image_pivots < 1 or self.text_pivots < 1:
            raise UsageError(
                f"DART has no image_pivots={self.image_pivots!r} with text_pivots={self.text_pivots!r}.",
                "Use at least 1 of each; 4 and 4 are the published numbers.",
            )

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return image pivots and picks in order of position, [T, K]; `features` are projected, [T, N, D]."""
        import torch

        tokens = features.float()
        tiles, count, width = tokens.shape
        by_size = ranks(last(tokens.abs().sum(dim=-1), valid))  # [T, N]
        order = by_size.topk(min(self.image_pivots, count), dim=-1, largest=False).indices
        rows = order.unsqueeze(-1).expand(-1, -1, width)
        texts = self._text_pivots(signals["question_embeds"]).expand(tiles, -1, -1)
        pivots = torch.cat([tokens.gather(1, rows), texts], dim=1)  # [T, P, D]
        unlike = -self._cosines(pivots, tokens)  # [T, P, N]
        if valid is not None:
            unlike = unlike.masked_fill(~valid.unsqueeze(1), _PADDING)
        whole = torch.full((1, 1), keep_tokens, dtype=torch.float32)
        each = ((whole - self.image_pivots) / (self.image_pivots + self.text_pivots)).clamp(min=0.0).floor()
        kept = by_size < whole.clamp(max=float(self.image_pivots))  # [T, N]
        turns = unlike.shape[1]
        for turn in range(turns):
            wanted = each if turn < turns - 1 else whole - kept.float().sum(dim=-1, keepdim=True)
            kept = kept | (ranks(unlike[:, turn].masked_fill(kept, _KEPT)) < wanted)
        return top_indices(kept.float(), keep_tokens)

    def _text_pivots(self, question: Tensor) -> Tensor:
        """Return the pivots among the question's tokens, largest first: [S, D] -> [text_pivots, D]."""
        import torch

        size = question.abs().sum(dim=-1)
        relative = size / size.amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny)  # in [0, 1]
        # Tokens of a second round rank behind those of the first.
        rounds = torch.cat([relative - 2.0 * index for index in range(self.text_pivots)])
        order = rounds.topk(self.text_pivots).indices
        return torch.cat([question] * self.text_pivots).index_select(0, order)

    def _cosines(self, pivots: Tensor, tokens: Tensor) -> Tensor:
        """Return the cosine of each pivot and each token: [T, P, D], [T, N, D] -> [T, P, N]."""
        import torch

        # Dividing the products, not the tokens, saves a copy of all tokens.
        length = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-12)
        unit = torch.nn.functional.normalize(pivots, dim=-1)
        cosines: Tensor = (unit @ tokens.transpose(1, 2)) / length.unsqueeze(1)
        return cosines
