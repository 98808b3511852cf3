"""Signals that a vision encoder can give a pruning method: a vector over the visual tokens, or a matrix.

A signal is computed in float32 from the attention of one layer: the layer whose output the projector takes,
or an earlier one. `SIGNALS` is the table of all signals. A method names those that it needs, and the exported
vision encoder puts out these and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SIGNALS", "LayerAttention", "Signal"]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention of one layer of the vision tower.

    Attributes:
        logits: [T, H, rows, n] float32, scaled, before the softmax. The rows are all n queries, or the first.
        prefix_tokens: Tokens before the patches (1 for a CLS).
        skipped_patches: Patches before visual token 0, which the projector does not take.
    """

    logits: Tensor
    prefix_tokens: int
    skipped_patches: int

    def over_patches(self, attention: Tensor) -> Tensor:
        """Average over heads, without the prefix: [T, H, n, n] -> [T, patches, patches]."""
        mean: Tensor = attention.mean(dim=1)
        return mean[:, self.prefix_tokens :, self.prefix_tokens :]

    def visual(self, vector: Tensor) -> Tensor:
        """Return the entries of the visual tokens: [T, patches] -> [T, N]."""
        return vector[:, self.skipped_patches :]


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal: how it is computed, and from which layer.

    Attributes:
        compute: Maps a layer's attention to [T, N], or to [T, N, N] for a matrix, in float32.
        rows: Queries that it reads. For the first query alone, no square matrix is computed.
        depth: The layer, as a fraction of the layers up to the feature layer; 1 is the feature layer.
        matrix: Whether the signal is a matrix.
    """

    compute: Callable[[LayerAttention], Tensor]
    rows: Literal["all", "first"] = "all"
    depth: Fraction = Fraction(1)
    matrix: bool = False

    def layer(self, layers: int) -> int:
        """Return the 0-based layer that it reads, of a number of layers up to the feature layer."""
        return max(1, int(layers * self.depth)) - 1

    def shape(self, visual_tokens: int) -> tuple[int, ...]:
        """Return the shape of the signal for one tile."""
        return (visual_tokens, visual_tokens) if self.matrix else (visual_tokens,)


def _attention_received(layer: LayerAttention) -> Tensor:
    """Return the mean attention probability that each visual token receives from the patches (FoPru, s_key).

    s[j] = mean_i mean_h softmax(logits)[h, i, j], CLS rows and columns dropped.

    Returns:
        [T, N] float32.
    """
    return layer.visual(layer.over_patches(layer.logits.softmax(dim=-1)).mean(dim=1))


def _attention_given(layer: LayerAttention) -> Tensor:
    """Return the mean attention probability that each visual token gives to the patches (FoPru, s_qry).

    Returns:
        [T, N] float32.
    """
    return layer.visual(layer.over_patches(layer.logits.softmax(dim=-1)).mean(dim=2))


def _logits_received(layer: LayerAttention) -> Tensor:
    """Return the attention received, from the logits before the softmax: [T, N] float32."""
    return layer.visual(layer.over_patches(layer.logits).mean(dim=1))


def _attention_map(layer: LayerAttention) -> Tensor:
    """Average the probabilities among visual tokens over heads: [T, N, N] float32, rows are queries."""
    patches = layer.over_patches(layer.logits.softmax(dim=-1))
    return patches[:, layer.skipped_patches :, layer.skipped_patches :]


def _cls_attention(layer: LayerAttention) -> Tensor:
    """Average the probabilities that the CLS token gives to visual tokens over heads: [T, N] float32."""
    given = layer.logits[:, :, 0].softmax(dim=-1).mean(dim=1)  # [T, n]
    return layer.visual(given[:, layer.prefix_tokens :])


SIGNALS = {
    "attention_received": Signal(_attention_received),
    "attention_given": Signal(_attention_given),
    "logits_received": Signal(_logits_received),
    "cls_attention": Signal(_cls_attention, rows="first"),
    "attention_map": Signal(_attention_map, matrix=True),
    "attention_map_half": Signal(_attention_map, depth=Fraction(1, 2), matrix=True),
    "attention_map_third": Signal(_attention_map, depth=Fraction(1, 3), matrix=True),
    "attention_map_quarter": Signal(_attention_map, depth=Fraction(1, 4), matrix=True),
}
