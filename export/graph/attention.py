"""How attention is spelled in exported graphs.

Hugging Face modules call whatever attention function their configuration names. Two are
registered here; tracing a model under one of them writes its attention in that flavour, with the
model's own code around it untouched. A layer whose attention a pruning method reads runs inside
`recording`, which takes what the method wants and no more: where one query is enough the layer
itself stays fused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = ["IMPLEMENTATION", "Recorder", "recording", "register"]

IMPLEMENTATION = {"native": "visprune_native", "primitive": "visprune_primitive"}

# Heads are taken in so many parts where only their maximum is wanted. More would save memory in a prefill,
# and cost time in each decoded token, where every operator counts.
_PARTS = 4


@dataclass(slots=True)
class Recorder:
    """What one call of an attention layer is to leave behind.

    Attributes:
        rows: The queries that are wanted.
        maximum: Whether the heads' probabilities are wanted as their maximum, [B, rows, P + S] float32;
            otherwise the logits of each head are, [B, H, rows, P + S] float32.
        value: The recorded tensor.
    """

    rows: Literal["all", "first", "last"] = "all"
    maximum: bool = False
    value: Tensor = field(init=False)


# Not an argument: some layers of transformers do not pass on what they do not know.
_wanted: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """The attention layer called in this block leaves with `recorder` what that asks for."""
    token = _wanted.set(recorder)
    try:
        yield
    finally:
        _wanted.reset(token)


def _native(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The ONNX `Attention` operator: one output, no past (the cache is outside; see `merged_heads`)."""
    recorder = _wanted.get()
    if recorder is not None and recorder.rows == "all":
        return _primitive(module, query, key, value, attention_mask, **kwargs)
    scale = _scale(query, kwargs)
    if recorder is not None:
        recorder.value = _one_row(query, key, scale, recorder.rows)
    out, *_ = torch.onnx.ops.attention(query, key, value, attn_mask=attention_mask, scale=scale)
    return out.transpose(1, 2), None  # [B, S, H, Dh]


def _primitive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """MatMul, Softmax, MatMul."""
    recorder = _wanted.get()
    scale = _scale(query, kwargs)
    if recorder is not None and recorder.maximum:
        out, recorder.value = _heads_in_parts(query * scale, key, value, attention_mask)
        return out.transpose(1, 2), None
    logits = _logits(query * scale, key, attention_mask)  # [B, H, S, P + S]
    if recorder is not None:
        recorder.value = logits if recorder.rows == "all" else _one_row(query, key, scale, recorder.rows)
    return _mixed(logits.softmax(dim=-1), value).transpose(1, 2), None  # [B, S, H, Dh]


def _logits(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Of scaled queries, in float32: [B, H, S, P + S]."""
    batch, heads, length, _ = query.shape
    logits = (_grouped(query, key.shape[1]) @ key.transpose(-1, -2)).float()
    logits = logits.reshape(batch, heads, length, key.shape[2])
    return logits if mask is None else logits + mask.float()


def _mixed(probabilities: Tensor, value: Tensor) -> Tensor:
    """The values by their probabilities: [B, H, S, Dh]."""
    batch, heads, length, _ = probabilities.shape
    mixed = _grouped(probabilities.to(value.dtype), value.shape[1]) @ value
    return mixed.reshape(batch, heads, length, value.shape[3])


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """Heads that share keys, one below the other: [B, H, S, X] -> [B, Hkv, G S, X]. No key is copied."""
    batch, heads, length, width = rows.shape
    return rows.reshape(batch, kv_heads, heads // kv_heads * length, width)


def _one_row(query: Tensor, key: Tensor, scale: float, rows: Literal["all", "first", "last"]) -> Tensor:
    """Logits of the first or the last query, which sees every key: [B, H, 1, P + S]."""
    row = query[:, :, :1] if rows == "first" else query[:, :, -1:]
    return _logits(row * scale, key, None)


def _heads_in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention, with the probabilities of some heads at a time: out [B, H, S, Dh], maximum [B, S, P + S].

    Heads that share keys stay together, so that no cache is copied; where all do, there is one part.
    """
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    size = -(-kv_heads // _PARTS)
    outs, maxima = [], []
    for first in range(0, kv_heads, size):
        part = slice(first, min(first + size, kv_heads))
        heads = slice(part.start * groups, part.stop * groups)
        probabilities = _logits(query[:, heads], key[:, part], mask).softmax(dim=-1)
        outs.append(_mixed(probabilities, value[:, part]))
        maxima.append(probabilities.amax(dim=1))
    return torch.cat(outs, dim=1), functools.reduce(torch.maximum, maxima)


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def register() -> None:
    """Make both flavours known to transformers; doing it twice changes nothing."""
    AttentionInterface.register(IMPLEMENTATION["native"], _native)
    AttentionInterface.register(IMPLEMENTATION["primitive"], _primitive)
