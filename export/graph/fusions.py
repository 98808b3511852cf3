"""Fusion into operators of opset 23, with a rule for the rotary embedding of a float16 decoder.

In float16 transformers computes cosine and sine in float32 and casts them, which onnxscript's own rule does
not match.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import onnx_fusions, pattern

__all__ = ["fuse"]


def fuse(model: ir.Model) -> None:
    """Replace groups of operators by `RMSNormalization` and `RotaryEmbedding`, in place."""
    onnx_fusions.fuse(model)
    rule = _CastRotary.rule()  # type: ignore[no-untyped-call]
    pattern.RewriteRuleSet([rule]).apply_to_model(model)


class _CastRotary(pattern.RewriteRuleClassBase):
    """A rule for x * cos + rotate_half(x) * sin, with x [B, H, S, Dh] and frequencies [B, S, Dh / 2]."""

    def __init__(self) -> None:
        super().__init__("CastRotary", remove_nodes=False)  # all layers share the nodes of cosine and sine

    def pattern(
        self, op: Any, x: Any, freqs: Any, cos_to: Any, sin_to: Any, half: Any, middle: Any, last: Any
    ) -> Any:
        """Return the pattern, as transformers writes it for Llama and similar decoders."""
        angles = op.Concat(freqs, freqs, axis=-1)
        cos = op.Unsqueeze(op.Cast(op.Cos(angles), to=cos_to), [1])
        sin = op.Unsqueeze(op.Cast(op.Sin(angles), to=sin_to), [1])
        first, second = op.Slice(x, [0], half, [3], [1]), op.Slice(x, middle, last, [3], [1])
        return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin

    def check(self, op: Any, *_: Any, **found: Any) -> Any:
        """Check that the head is cut into two halves, which the pattern itself cannot say."""
        result, shape = pattern.MatchResult(), found["x"].shape
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return result.fail("The head size is not known.", found["x"])
        if {_single(found["half"]), _single(found["middle"])} != {shape[3] // 2}:
            return result.fail("It is not cut into halves.", found["half"])
        return result

    def rewrite(
        self, op: Any, x: ir.Value, freqs: ir.Value, cos_to: ir.Attr, sin_to: ir.Attr, **_: Any
    ) -> Any:
        """Return the fused operator; it takes one cosine and one sine for each pair, [B, S, Dh / 2]."""
        cos, sin = op.Cast(op.Cos(freqs), to=cos_to.value), op.Cast(op.Sin(freqs), to=sin_to.value)
        return op.RotaryEmbedding(x, cos, sin, interleaved=0)


def _single(value: ir.Value) -> int | None:
    """Return the number in a constant of one element; None for any other value."""
    constant = ir.convenience.get_const_tensor(value)
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
