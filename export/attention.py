"""How attention is spelled in exported graphs.

Hugging Face modules call whatever attention function their configuration names. Two are
registered here; tracing a model under one of them writes its attention in that flavour, with the
model's own code around it untouched. A layer whose attention a pruning method reads is called with
a `recorder`: that layer alone is spelled out, and its logits are recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = ["IMPLEMENTATION", "register"]

IMPLEMENTATION = {"native": "visprune_native", "primitive": "visprune_primitive"}


def _native(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The ONNX `Attention` operator: one output, no past (the cache is concatenated outside)."""
    if kwargs.get("recorder") is not None:
        return _primitive(module, query, key, value, attention_mask, **kwargs)
    scale = _scale(query, kwargs)
    out, *_ = torch.onnx.ops.attention(query, key, value, attn_mask=attention_mask, scale=scale)
    return out.transpose(1, 2), None  # [B, S, H, Dh]


def _primitive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """MatMul, Softmax, MatMul. Grouped heads share keys by broadcasting, so no cache is copied."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    query = query * _scale(query, kwargs)
    if groups > 1:
        query = query.unflatten(1, (-1, groups))  # [B, Hkv, G, S, Dh]
        key, value = key.unsqueeze(2), value.unsqueeze(2)  # [B, Hkv, 1, P + S, Dh]
    logits = (query @ key.transpose(-1, -2)).float()  # [..., S, P + S]
    if attention_mask is not None:
        mask = attention_mask.float()
        logits = logits + (mask.unsqueeze(2) if groups > 1 else mask)
    recorder: list[Tensor] | None = kwargs.get("recorder")
    if recorder is not None:
        recorder.append(logits.flatten(1, 2) if groups > 1 else logits)  # [B, H, S, P + S]
    out = logits.softmax(dim=-1).to(value.dtype) @ value
    return out.reshape(batch, heads, length, -1).transpose(1, 2), None  # [B, S, H, Dh]


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def register() -> None:
    """Make both flavours known to transformers; doing it twice changes nothing."""
    AttentionInterface.register(IMPLEMENTATION["native"], _native)
    AttentionInterface.register(IMPLEMENTATION["primitive"], _primitive)
