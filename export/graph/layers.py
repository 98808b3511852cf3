"""A decoder layer in its two halves, made of the layer's own submodules.

Tokens that a method deletes leave between the halves, so whoever cuts a decoder or runs it half by half
uses these. They hold for layers of Llama's form (`models.DECODERS`): norm, attention, residual; norm,
MLP, residual; and nothing between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visprune.export.graph.attention import Recorder, recording

__all__ = ["GraphCache", "attend", "causal_mask", "feed_forward"]


class GraphCache:
    """What a decoder layer calls to extend its keys and values: concatenation, and nothing kept.

    Args:
        past: Key and value of each layer in turn.
        first: Absolute index of the first of them.
    """

    def __init__(self, past: Sequence[Tensor], first: int = 0) -> None:
        self.past = past
        self.first = first
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [B, Hkv, P + S, Dh] each."""
        index = 2 * (layer_idx - self.first)
        key = torch.cat([self.past[index], key], dim=2)
        value = torch.cat([self.past[index + 1], value], dim=2)
        self.present += [key, value]
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """P."""
        return self.past[0].shape[2]


def causal_mask(length: int, before: int, dtype: torch.dtype) -> Tensor:
    """What each of S new tokens may not see of P cached ones and of each other: [1, 1, S, P + S].

    It counts tokens and not positions, which may have gaps.
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
    """The first half: [B, S, D] -> [B, S, D], the residual added."""
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
    """The second half: [B, S, D] -> [B, S, D], the residual added."""
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
