"""SparseVLM: drop, in three layers, the visual tokens that the text about the picture attends to least.

Source: arXiv 2410.04417, in its form with fixed counts and without recycling of dropped tokens.

Text tokens that say something about the pictures are the *raters*. They are found once, on the input
embeddings of the LLM: V the visual ones, t those of the text after the last new picture.

    share[j] = mean over visual tokens of softmax over t of (V t^T)[i, j]        float32, not scaled
    raters   = the tokens of t whose share is above the mean of all shares

Then, inside the LLM, with P the softmax probabilities of a prune layer (2, 6 and 15 of 32, from 0):

    score[j] = mean over heads and raters i of P[h, i, j]

The visual tokens with the largest scores stay, and keep their original positions. The published form drops
the others after the layer. Here they leave before its MLP already, which treats every token by itself: the
kept tokens are computed the same.

The published form has three lists of counts for 576 visual tokens: 300, 200, 110 for a budget of 192 tokens,
303, 110, 36 for 128, and 66, 30, 17 for 64. Here the counts follow from a ratio, in equal steps. The default
leaves 110 of 576 in the end, as the first list does, by way of 331 and 191.

If no share is above the mean, because there is one token of text or all are alike, all of t rates. If a
prompt ends with a picture, there is no t; the last token that reaches the layer rates then, as in FastV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from visprune.budget import LayerBudget
from visprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SparseVLM"]

_DEPTH = 32  # layers of the decoder for which the paper names its prune layers


@dataclass(frozen=True, slots=True)
class SparseVLM:
    """Drop in stages what the text about the image attends to least.

    Attributes:
        stages: Prune layers in a decoder of 32 layers, from 0. In one of L layers they are
            floor(L stage / 32); equal ones count once, and the last layer prunes nothing.
    """

    place: ClassVar[str] = "inside the LLM"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    positions: ClassVar[Literal["original"]] = "original"
    boundary: ClassVar[Literal["attention"]] = "attention"
    rows: ClassVar[Literal["raters"]] = "raters"
    heads: ClassVar[Literal["mean"]] = "mean"

    stages: tuple[int, ...] = (2, 6, 15)

    def __post_init__(self) -> None:
        if not self.stages or not set(self.stages) <= set(range(_DEPTH)):
            raise UsageError(
                f"SparseVLM cannot prune at the stages {self.stages}.",
                f"Give at least one layer, each from 0 to {_DEPTH - 1}, as in a decoder of {_DEPTH} layers.",
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the prune layers: the stages, scaled to the decoder, without its last layer.

        Raises:
            UnsupportedError: No prune layer has another one after it.
        """
        scaled = {num_layers * stage // _DEPTH for stage in self.stages}
        found = tuple(sorted(scaled - {num_layers - 1}))
        if not found:
            raise UnsupportedError(
                f"SparseVLM's stages {self.stages} are all the last layer of a decoder of {num_layers} "
                "layers, where pruning saves nothing.",
                "Give smaller stages, or choose another method.",
            )
        return found

    def budget(self, points: int) -> LayerBudget:
        """Keep 110 of 576 tokens in the end unless another ratio is asked for, in equal steps."""
        return LayerBudget(points, ratio=110 / 576)

    def raters(self, embeds: Tensor, is_visual: Tensor) -> Tensor:
        """Find the text tokens after the last picture that the visual tokens resemble most.

        Args:
            embeds: [B, S, D], input embeddings of the new tokens.
            is_visual: [B, S] bool.

        Returns:
            [B, S] bool. Without visual tokens all tokens rate; with no text after them, none does.
        """
        import torch

        place = torch.arange(embeds.shape[1]).float()  # [S]
        last_visual = torch.where(is_visual, place, -1.0).amax(dim=1, keepdim=True)  # [B, 1]
        text = place > last_visual  # [B, S]
        tokens = embeds.float()
        logits = tokens @ tokens.transpose(1, 2)  # [B, S, S]
        hidden = torch.finfo(torch.float32).min
        resemblance = logits.masked_fill(~text.unsqueeze(1), hidden).softmax(dim=-1)
        visual = is_visual.float()
        sums = (visual.unsqueeze(1) @ resemblance).squeeze(1)  # [B, S], the shares times n visual tokens
        # The shares of m tokens of text sum to one, so their mean is 1 / m, and that of the sums n / m.
        above = text & (sums * _count(text.float()) > _count(visual))
        return above | (text & (_count(above.float()) < 1))

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """Return the mean attention of the raters: [B, 1, S] -> [B, S]."""
        return attention[:, 0]


def _count(marks: Tensor) -> Tensor:
    """Return how many ones each row has: [B, S] -> [B, 1]."""
    return marks.sum(dim=1, keepdim=True)
