"""The attention functions that decide how attention is written in exported graphs.

Hugging Face modules call the attention function that their configuration names. Two are registered here, one
for each flavour; a model traced with one of them has its attention in that flavour, and its other code
unchanged. A layer whose attention a pruning method reads runs inside `recording`, which records only what the
method needs: if one query is enough, the layer itself stays fused.
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

# The number of parts into which heads are split if only their maximum or mean is recorded. More parts would
# save memory in a prefill, but cost time in each decoded token, where every operator counts.
_PARTS = 4


@dataclass(slots=True)
class Recorder:
    """A request to record the attention of one call of an attention layer, and the recorded tensor.

    Attributes:
        rows: Which queries are recorded; None for no attention.
        maximum: Whether the maximum of the heads' probabilities is recorded, [B, rows, P + S] float32,
            instead of the logits of each head, [B, H, rows, P + S] float32.
        weights: A weight for each query, [B, S] float32. With weights, the sum of the queries' probabilities
            is recorded, weighted by them, as a mean over heads: [B, 1, P + S] float32.
        value: The recorded attention; set by the call.
        key: The keys of the call, [B, Hkv, P + S, Dh], unless probabilities are recorded.
    """

    rows: Literal["all", "first", "last"] | None = "all"
    maximum: bool = False
    weights: Tensor | None = None
    value: Tensor = field(init=False)
    key: Tensor = field(init=False)

    @property
    def reduces(self) -> bool:
        """Whether probabilities are recorded, reduced over heads, and not the logits of each head."""
        return self.maximum or self.weights is not None


# This is no argument, because some layers of transformers do not pass on arguments that they do not know.
_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """Have the attention layer that is called in this block record its attention in `recorder`."""
    token = _current.set(recorder)
    try:
        yield
    finally:
        _current.reset(token)


def _native(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend with the ONNX `Attention` operator, without its cache inputs, which `merged_heads` may add."""
    recorder = _current.get()
    if recorder is not None and recorder.rows == "all":
        return _primitive(module, query, key, value, attention_mask, **kwargs)
    scale = _scale(query, kwargs)
    if recorder is not None:
        recorder.key = key
        if recorder.rows is not None:
            recorder.value = _row_logits(query, key, scale, recorder.rows)
    out, *_ = torch.onnx.ops.attention(query, key, value, attn_mask=attention_mask, scale=scale)
    return out.transpose(1, 2), None  # [B, S, H, Dh]


def _primitive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend with the operators MatMul, Softmax and MatMul."""
    recorder = _current.get()
    scale = _scale(query, kwargs)
    if recorder is not None and recorder.reduces:
        out, recorder.value = _heads_in_parts(query * scale, key, value, attention_mask, recorder.weights)
        return out.transpose(1, 2), None
    logits = _logits(query * scale, key, attention_mask)  # [B, H, S, P + S]
    if recorder is not None:
        recorder.key = key
        if recorder.rows is not None:
            every = recorder.rows == "all"
            recorder.value = logits if every else _row_logits(query, key, scale, recorder.rows)
    return _weighted_values(logits.softmax(dim=-1), value).transpose(1, 2), None  # [B, S, H, Dh]


def _logits(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention logits of scaled queries: [B, H, S, P + S] float32."""
    batch, heads, length, _ = query.shape
    logits = (_grouped(query, key.shape[1]) @ key.transpose(-1, -2)).float()
    logits = logits.reshape(batch, heads, length, key.shape[2])
    return logits if mask is None else logits + mask.float()


def _weighted_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Return the sums of the values, weighted by the probabilities: [B, H, S, Dh]."""
    batch, heads, length, _ = probabilities.shape
    mixed = _grouped(probabilities.to(value.dtype), value.shape[1]) @ value
    return mixed.reshape(batch, heads, length, value.shape[3])


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """Stack the heads that share keys, so that no key is copied: [B, H, S, X] -> [B, Hkv, G S, X]."""
    batch, heads, length, width = rows.shape
    return rows.reshape(batch, kv_heads, heads // kv_heads * length, width)


def _row_logits(query: Tensor, key: Tensor, scale: float, rows: Literal["all", "first", "last"]) -> Tensor:
    """Return the logits of the first or last query over all keys: [B, H, 1, P + S]."""
    row = query[:, :, :1] if rows == "first" else query[:, :, -1:]
    return _logits(row * scale, key, None)


def _heads_in_parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with a part of the heads at a time, so that not all probabilities are in memory at once.

    Heads that share keys stay in one part, so that no cache is copied.

    Returns:
        The output [B, H, S, Dh], and the maximum of the heads' probabilities [B, S, P + S]; with weights
        [B, S], their mean over heads, summed over queries by weight, [B, 1, P + S].
    """
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    size = -(-kv_heads // _PARTS)
    rows = None if weights is None else weights[:, None, None] / query.shape[1]  # [B, 1, 1, S]
    outs, reduced = [], []
    for first in range(0, kv_heads, size):
        part = slice(first, min(first + size, kv_heads))
        heads = slice(part.start * groups, part.stop * groups)
        probabilities = _logits(query[:, heads], key[:, part], mask).softmax(dim=-1)
        outs.append(_weighted_values(probabilities, value[:, part]))
        reduced.append(probabilities.amax(dim=1) if rows is None else (rows @ probabilities).sum(dim=1))
    return torch.cat(outs, dim=1), functools.reduce(torch.maximum if rows is None else torch.add, reduced)


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def register() -> None:
    """Register both attention functions with transformers; further calls change nothing."""
    AttentionInterface.register(IMPLEMENTATION["native"], _native)
    AttentionInterface.register(IMPLEMENTATION["primitive"], _primitive)
