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
    out = torch.onnx.ops.attention(query, key, value, attn_mask=attention_mask, scale=_scale(query, kwargs))[0]
    return out.transpose(1, 2), None  # [B, S, H, Dh]


def _primitive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """MatMul, Softmax, MatMul. Grouped heads share keys by broadcasting, so no cache is copied."""
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = (query * _scale(query, kwargs)).reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    logits = (grouped @ key.unsqueeze(2).transpose(-1, -2)).float()  # [B, Hkv, G, S, P + S]
    if attention_mask is not None:
        logits = logits + attention_mask.unsqueeze(2).float()
    recorder: list[Tensor] | None = kwargs.get("recorder")
    if recorder is not None:
        recorder.append(logits.flatten(1, 2))  # [B, H, S, P + S]
    out = logits.softmax(dim=-1).to(value.dtype) @ value.unsqueeze(2)
    return out.reshape(batch, heads, length, -1).transpose(1, 2), None


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def register() -> None:
    """Make both flavours known to transformers; doing it twice changes nothing."""
    AttentionInterface.register(IMPLEMENTATION["native"], _native)
    AttentionInterface.register(IMPLEMENTATION["primitive"], _primitive)
