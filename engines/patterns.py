"""How the exporter's decoders spell what depends on the number of tokens held.

P is what the cache holds, S what is new. A value has columns if one of its dimensions is P + S.
"""

from __future__ import annotations

import math

import onnx_ir as ir

__all__ = [
    "HELD",
    "MOVES",
    "PAST",
    "axis",
    "count",
    "is_causal",
    "is_masked",
    "is_range",
    "made_by",
    "over",
    "rank",
    "takes_new",
    "terms",
]

Count = tuple[int, int, int]
"""An integer that a graph works out: so many times 1, P and S."""

PAST, HELD = ("P",), ("P", "S")
"""The terms of a dimension."""

MOVES = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that change how a value is held, and not what it is."""

_SIZES = {PAST: (0, 1, 0), ("S",): (0, 0, 1), HELD: (0, 1, 1)}


def terms(dim: int | ir.SymbolicDim) -> tuple[str, ...]:
    """Of a dimension such as P + S, in alphabetical order."""
    return tuple(sorted(str(dim).split(" + ")))


def rank(value: ir.Value | None) -> int:
    """Number of dimensions; 0 where it is not told."""
    return len(value.shape) if value is not None and value.shape is not None else 0


def axis(value: ir.Value | None) -> int | None:
    """Which dimension is P + S; None: the value has no columns."""
    shape = value.shape if value is not None else None
    found = [index for index, dim in enumerate(shape or ()) if terms(dim) == HELD]
    return found[0] if len(found) == 1 else None


def over(node: ir.Node) -> int:
    """The axis that a node works on, counted from the first."""
    given = _number(node, "axis", -1)
    return given if given >= 0 else given + rank(node.inputs[0])


def made_by(operator: str, value: ir.Value | None) -> ir.Node | None:
    """The node of a kind that a value comes from, perhaps moved on the way."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type != operator and node.op_type in MOVES:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == operator else None


def is_masked(scores: ir.Value) -> bool:
    """Whether the causal mask is added to scores."""
    node = scores.producer()
    return node is not None and node.op_type == "Add" and any(map(is_causal, node.inputs))


def is_causal(mask: ir.Value | None) -> bool:
    """Whether a value is the exporter's mask: very low where column > P + row, and 0 elsewhere."""
    chosen = made_by("Where", mask)
    later = made_by("Greater", chosen.inputs[0]) if chosen else None
    place = made_by("Add", later.inputs[1]) if later else None
    if chosen is None or later is None or place is None or axis(mask) != rank(mask) - 1:
        return False
    rows = any(
        is_range(one, (0, 0, 1)) and count(other) == (0, 1, 0)
        for one, other in (place.inputs, place.inputs[::-1])
    )
    is_low = _constant(chosen.inputs[1]) <= -(2.0**15) and _constant(chosen.inputs[2]) == 0
    return is_low and rows and is_range(later.inputs[0], (0, 1, 1))


def is_range(value: ir.Value | None, size: Count) -> bool:
    """Whether it is 0, 1, ... below so many."""
    node = made_by("Range", value)
    return node is not None and [count(one) for one in node.inputs] == [(0, 0, 0), size, (1, 0, 0)]


def takes_new(node: ir.Node) -> bool:
    """Whether a `Slice` takes the last S of P + S columns, and nothing else."""
    data, start, end, axes, *steps = node.inputs
    columns = axis(data)
    return (
        columns is not None
        and _constant(axes) in (columns, columns - rank(data))
        and count(start) in ((0, 0, -1), (0, 1, 0))
        and _constant(end) > 2**31 - 2
        and all(_constant(step) == 1 for step in steps)
    )


def count(value: ir.Value | None) -> Count | None:
    """An integer as a sum, as far as the graph says so; None: something else."""
    node = value.producer() if value is not None else None
    if node is None:
        number = _constant(value)
        return (int(number), 0, 0) if number.is_integer() else None
    if node.op_type in MOVES:
        return count(node.inputs[0])
    if node.op_type in ("Add", "Neg"):
        sign = -1 if node.op_type == "Neg" else 1
        found = [count(one) for one in node.inputs]
        known = [one for one in found if one is not None]
        one, past, new = (sign * sum(part) for part in zip(*known, strict=True)) if known else (0, 0, 0)
        return (one, past, new) if known == found else None
    shape = node.inputs[0].shape if node.op_type == "Shape" and node.inputs[0] is not None else None
    dims = shape[_number(node, "start", 0) : _number(node, "end", len(shape))] if shape is not None else ()
    if len(dims) != 1:
        return None
    return (dims[0], 0, 0) if isinstance(dims[0], int) else _SIZES.get(terms(dims[0]))


def _number(node: ir.Node, name: str, default: int) -> int:
    """An attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _constant(value: ir.Value | None) -> float:
    """The number that a constant is; NaN where it is none, or several."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else math.nan
