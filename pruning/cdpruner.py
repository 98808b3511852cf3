"""CDPruner: keep tokens that are diverse, and that matter for the question (arXiv 2506.10967).

Before the LLM, on the *projected* tokens: all N are projected, then K are chosen. The definition:

    L[i, j]  cosine of projected tokens i and j
    q[i]     minus the mean of the cosines of token i and the tokens of the question
    r[i]     (q[i] - min of q + 1e-6) / (max of q - min of q)
    picks    greedy MAP inference of the determinantal point process with the kernel r[i] L[i, j] r[j]: each
             pick is the token that makes the determinant of the kernel among the picks largest

The minus is the published sign. It was found for CLIP, whose patches of an object are often *less* like its
name than the background is. `relevance="alike"` is the other sign.

The published q compares CLIP's image features with CLIP's text features of the question. Checkpoints of
LLaVA have neither CLIP's text tower nor its projections, so that form is impossible with them. Here the
question is given by the LLM's own embeddings of its tokens, which are as wide as projected tokens, as in
OpenVINO GenAI.

How the picks are found. Let g[i] be 1 - the squared length of token i's projection on the picks' span: the
diagonal of what is left of L. The determinant grows by r[i]^2 g[i], so the next pick has the largest. The
division in r scales all alike and changes no pick; it is left out, and equal q are no special case. Picks are
made in blocks of four. A block reads what was left of L before it, and four rows of its Cholesky factor; then
these rows are taken from L. A graph makes as many blocks as K needs.

Ours: g below 1e-5 counts as 0, because rounding leaves nothing of smaller ones. Tokens that the picks span,
such as duplicates, are therefore kept last, in reading order. So are equal values in general.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from visprune.errors import UsageError
from visprune.pruning.base import Layout, TokenMethod
from visprune.pruning.select import ascending, repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CDPruner"]

_BLOCK = 4  # 8 is a little faster to run, and slower to trace
_SPANNED = 1e-5
_PADDING, _PICKED = -0.5, -1.0  # in place of g


@dataclass(frozen=True, slots=True)
class CDPruner(TokenMethod):
    """Keep diverse tokens that matter for the question.

    Attributes:
        relevance: Whether tokens "unlike" the question weigh more, as published, or those "alike".
    """

    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    chained: ClassVar[bool] = True
    projected: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    relevance: Literal["unlike", "alike"] = "unlike"

    def __post_init__(self) -> None:
        if self.relevance not in ("unlike", "alike"):
            raise UsageError(
                f"CDPruner has no relevance={self.relevance!r}.",
                'Use "unlike", which is the published sign, or "alike".',
            )

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
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        left = unit @ unit.transpose(1, 2)  # [T, N, N]
        weight = self._weights(unit, signals["question_embeds"], valid)
        novelty = torch.ones_like(weight)  # g, [T, N]
        if valid is not None:
            novelty = novelty.masked_fill(~valid, _PADDING)
        position = torch.arange(count).unsqueeze(0)
        start = torch.arange(tiles) * count

        def block(state: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
            left, novelty = state
            rows = left.flatten(0, 1)  # [T * N, N]
            factor = rows.new_zeros(0)  # [T, picks of this block, N], rows of the Cholesky factor
            picks: list[Tensor] = []
            for taken in range(_BLOCK):
                gain = torch.where(novelty < _SPANNED, novelty.clamp(max=0.0), novelty * weight)
                pick = gain.argmax(dim=-1)  # [T]
                row = rows.index_select(0, pick + start)
                column = pick.unsqueeze(1)  # [T, 1]
                if taken:
                    own = factor.gather(2, column.unsqueeze(1).expand(-1, taken, -1))  # [T, taken, 1]
                    row = row - (own.transpose(1, 2) @ factor).squeeze(1)
                rest = novelty.gather(1, column)
                scale = torch.where(rest < _SPANNED, 0.0, rest.clamp(min=_SPANNED).rsqrt())
                row = row * scale
                novelty = torch.where(novelty < 0, novelty, (novelty - row.square()).clamp(min=0.0))
                novelty = torch.where(position == column, _PICKED, novelty)
                row = row.unsqueeze(1)
                factor = torch.cat([factor, row], dim=1) if taken else row
                picks.append(pick.float())
            return (left - factor.transpose(1, 2) @ factor, novelty), torch.stack(picks)

        # `repeat` wants a symbol: a number that is read from a tensor is one, an expression of K is not.
        blocks = cast("int", torch.full((), (keep_tokens + _BLOCK - 1) // _BLOCK).item())
        torch._check(blocks >= 1)
        _, picks = repeat(block, (left, novelty), blocks)  # [blocks, 4, T] float32, as a Scan wants it
        first = picks.flatten(0, 1).index_select(0, torch.arange(keep_tokens))  # [K, T]
        return ascending(first.transpose(0, 1).long())

    def _weights(self, unit: Tensor, question: Tensor, valid: Tensor | None) -> Tensor:
        """Return the squares of r times a constant: [T, N, D] of length 1, [S, D] -> [T, N]."""
        import torch

        alike = unit @ torch.nn.functional.normalize(question, dim=-1).mean(dim=0)  # [T, N]
        wanted = alike if self.relevance == "alike" else -alike
        least = wanted if valid is None else wanted.masked_fill(~valid, 2.0)
        return (wanted - least.amin(dim=-1, keepdim=True) + 1e-6).square()
