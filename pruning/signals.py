"""What a vision encoder can tell a pruning method: one vector over the visual tokens each.

A signal is computed in float32 from the attention of the layer whose output the projector takes.
`SIGNALS` is the literal table of them; a method names those it needs, and the exported vision
encoder puts out these and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SIGNALS", "LayerAttention"]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention.

    Attributes:
        logits: [T, H, n, n] float32, scaled, before the softmax.
        prefix_tokens: Tokens before the patches (1 for a CLS).
        skipped_patches: Patches before visual token 0, which the projector does not take.
    """

    logits: Tensor
    prefix_tokens: int
    skipped_patches: int

    def over_patches(self, attention: Tensor) -> Tensor:
        """Mean over heads, without the prefix's rows and columns: [T, H, n, n] -> [T, patches, patches]."""
        mean: Tensor = attention.mean(dim=1)
        return mean[:, self.prefix_tokens :, self.prefix_tokens :]

    def visual(self, vector: Tensor) -> Tensor:
        """The entries of the visual tokens: [T, patches] -> [T, N]."""
        return vector[:, self.skipped_patches :]


def attention_received(layer: LayerAttention) -> Tensor:
    """Mean attention probability each visual token receives from the patches (FoPru, s_key).

    s[j] = mean_i mean_h softmax(logits)[h, i, j], CLS rows and columns dropped.

    Returns:
        [T, N] float32.
    """
    return layer.visual(layer.over_patches(layer.logits.softmax(dim=-1)).mean(dim=1))


def attention_given(layer: LayerAttention) -> Tensor:
    """Mean attention probability each visual token gives to the patches (FoPru, s_qry): [T, N] float32."""
    return layer.visual(layer.over_patches(layer.logits.softmax(dim=-1)).mean(dim=2))


def logits_received(layer: LayerAttention) -> Tensor:
    """As `attention_received`, from the logits before the softmax: [T, N] float32."""
    return layer.visual(layer.over_patches(layer.logits).mean(dim=1))


SIGNALS: dict[str, Callable[[LayerAttention], Tensor]] = {
    "attention_received": attention_received,
    "attention_given": attention_given,
    "logits_received": logits_received,
}
