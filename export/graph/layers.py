"""The two halves of a decoder layer, made of the layer's own submodules.

Some methods delete tokens between the halves, so a decoder may be cut there or run half by half. The
functions are right for layers of Llama's form (`models.DECODERS`): norm, attention, residual; then norm, MLP,
residual; and nothing between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visprune.export.graph.attention import Recorder, recording

__all__ = ["GraphCache", "attend", "causal_mask", "feed_forward"]


class GraphCache:
    """A cache that a decoder layer can call during tracing: it concatenates past and new keys and values.

    Args:
        past: Key and value of each layer, in the order of the layers.
        first: Index in the decoder of the first of these layers.

    Attributes:
        present: The concatenated key and value of each layer that was called.
    """

    def __init__(self, past: Sequence[Tensor], first: int = 0) -> None:
        self.past = past
        self.first = first
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, [B, Hkv, P + S, Dh] each."""
        index = 2 * (layer_idx - self.first)
        key = torch.cat([self.past[index], key], dim=2)
        value = torch.cat([self.past[index + 1], value], dim=2)
        self.present += [key, value]
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """Return P, the number of past tokens."""
        return self.past[0].shape[2]


def causal_mask(length: int, before: int, dtype: torch.dtype) -> Tensor:
    """Return the additive causal mask of S new tokens over P cached tokens and themselves: [1, 1, S, P + S].

    It goes by the order of the tokens and not by their positions, which may have gaps.

    Args:
        length: S.
        before: P.
        dtype: Dtype of the mask; its minimum marks what a token must not see.
    """
    query = torch.arange(length).unsqueeze(1) + before  # [S, 1]
    hidden_from = torch.arange(before + length).unsqueeze(0) > query  # [S, P + S]
    mask = torch.zeros((), dtype=dtype).masked_fill(hidden_from, torch.finfo(dtype).min)
    return mask[None, None]


def attend(
    layer: Any,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Run the first half, the attention block with its residual: [B, S, D] -> [B, S, D]."""
    with recording(recorder):
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            attention_mask=mask,
            past_key_values=cache,
            position_embeddings=position_embeddings,
        )
    out: Tensor = hidden + attended
    return out


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """Run the second half, the MLP block with its residual: [B, S, D] -> [B, S, D]."""
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
