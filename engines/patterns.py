"""Patterns in which the exporter's decoder graphs use the number of tokens in the cache.

P is the number of tokens in the cache, S that of new tokens. A value has columns if one of its dimensions is
P + S.
"""

from __future__ import annotations

import math

import onnx_ir as ir

__all__ = [
    "MOVES",
    "PAST",
    "TOTAL",
    "as_count",
    "axis_of",
    "column_axis",
    "find_producer",
    "is_causal",
    "is_masked",
    "is_range",
    "rank",
    "takes_new_columns",
    "terms",
]

Count = tuple[int, int, int]
"""An integer that a graph computes, as the sum of multiples (a, b, c): a + b P + c S."""

PAST: tuple[str, ...] = ("P",)
"""The terms of the dimension P: the tokens in the cache."""

TOTAL: tuple[str, ...] = ("P", "S")
"""The terms of the dimension P + S: the tokens in the cache after a step."""

MOVES = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that change the shape or type of a value, and not its numbers."""

_SIZES = {PAST: (0, 1, 0), ("S",): (0, 0, 1), TOTAL: (0, 1, 1)}


def terms(dim: int | ir.SymbolicDim) -> tuple[str, ...]:
    """Return the terms of a dimension such as P + S, in alphabetical order."""
    return tuple(sorted(str(dim).split(" + ")))


def rank(value: ir.Value | None) -> int:
    """Return the number of dimensions of a value; 0 if its shape is unknown."""
    return len(value.shape) if value is not None and value.shape is not None else 0


def column_axis(value: ir.Value | None) -> int | None:
    """Return the index of the dimension P + S; None if the value has no columns."""
    shape = value.shape if value is not None else None
    found = [index for index, dim in enumerate(shape or ()) if terms(dim) == TOTAL]
    return found[0] if len(found) == 1 else None


def axis_of(node: ir.Node) -> int:
    """Return the axis that a node works on, as a number from 0."""
    given = _number(node, "axis", -1)
    return given if given >= 0 else given + rank(node.inputs[0])


def find_producer(operator: str, value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value, if it has this operator. `MOVES` after it are passed over."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type != operator and node.op_type in MOVES:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == operator else None


def is_masked(scores: ir.Value) -> bool:
    """Check that the causal mask was added to scores."""
    node = scores.producer()
    return node is not None and node.op_type == "Add" and any(map(is_causal, node.inputs))


def is_causal(mask: ir.Value | None) -> bool:
    """Check that a value is the exporter's mask: very low where column > P + row, and 0 elsewhere."""
    chosen = find_producer("Where", mask)
    later = find_producer("Greater", chosen.inputs[0]) if chosen else None
    place = find_producer("Add", later.inputs[1]) if later else None
    if chosen is None or later is None or place is None or column_axis(mask) != rank(mask) - 1:
        return False
    rows = any(
        is_range(one, (0, 0, 1)) and as_count(other) == (0, 1, 0)
        for one, other in (place.inputs, place.inputs[::-1])
    )
    is_low = _constant(chosen.inputs[1]) <= -(2.0**15) and _constant(chosen.inputs[2]) == 0
    return is_low and rows and is_range(later.inputs[0], (0, 1, 1))


def is_range(value: ir.Value | None, size: Count) -> bool:
    """Check that a value is the range 0, 1, ..., size - 1."""
    node = find_producer("Range", value)
    return node is not None and [as_count(one) for one in node.inputs] == [(0, 0, 0), size, (1, 0, 0)]


def takes_new_columns(node: ir.Node) -> bool:
    """Check that a `Slice` takes the last S of P + S columns, and slices no other axis."""
    data, start, end, axes, *steps = node.inputs
    columns = column_axis(data)
    return (
        columns is not None
        and _constant(axes) in (columns, columns - rank(data))
        and as_count(start) in ((0, 0, -1), (0, 1, 0))
        and _constant(end) > 2**31 - 2
        and all(_constant(step) == 1 for step in steps)
    )


def as_count(value: ir.Value | None) -> Count | None:
    """Return an integer value as a sum of multiples of 1, P and S; None if it is not known to be one."""
    node = value.producer() if value is not None else None
    if node is None:
        number = _constant(value)
        return (int(number), 0, 0) if number.is_integer() else None
    if node.op_type in MOVES:
        return as_count(node.inputs[0])
    if node.op_type in ("Add", "Neg"):
        sign = -1 if node.op_type == "Neg" else 1
        found = [as_count(one) for one in node.inputs]
        known = [one for one in found if one is not None]
        one, past, new = (sign * sum(part) for part in zip(*known, strict=True)) if known else (0, 0, 0)
        return (one, past, new) if known == found else None
    shape = node.inputs[0].shape if node.op_type == "Shape" and node.inputs[0] is not None else None
    dims = shape[_number(node, "start", 0) : _number(node, "end", len(shape))] if shape is not None else ()
    if len(dims) != 1:
        return None
    return (dims[0], 0, 0) if isinstance(dims[0], int) else _SIZES.get(terms(dims[0]))


def _number(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node, or the default."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _constant(value: ir.Value | None) -> float:
    """Return the number in a constant; NaN if the value is no constant, or has several numbers."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else math.nan
