"""Where a factor for each channel can be hidden, so that it costs nothing at run time.

SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) divide the channels of an activation by factors and
multiply the rows of the weights behind it: x W = (x / s) (s W). The division needs a place:

    norm       the weight (and bias) of the norm that gives x
    product    x = a * b, where b comes from a linear layer: that layer's columns. In a gated MLP, `up_proj`
               carries the factors of `down_proj`

Only where nothing but linear layers reads x: whatever else did would see it divided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from visprune.quantize.linears import Linear

__all__ = ["Carrier", "find_carrier", "vectors_of"]

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True, eq=False)
class Carrier:
    """What is divided by the factors of an activation.

    Attributes:
        linear: The linear layer whose columns and bias are; None where it is the norm before the activation.
    """

    linear: Linear | None = None


def find_carrier(
    x: ir.Value, readers: Collection[Linear], by_output: Mapping[ir.Value, Linear]
) -> Carrier | None:
    """Where the factors of an activation can go.

    Args:
        x: The activation.
        readers: All linear layers that it enters.
        by_output: The linear layers of the graph by what they put out.

    Returns:
        None where there is no place.
    """
    ours = {linear.nodes[0] for linear in readers}
    node = x.producer()
    if node is None or x.is_graph_output() or any(use.node not in ours for use in x.uses()):
        return None
    if vectors_of(node):
        return Carrier()
    for factor in reversed(node.inputs) if node.op_type == "Mul" else ():
        linear = by_output.get(factor) if factor is not None else None
        if linear is not None and len(list(linear.y.uses())) == 1 and not linear.y.is_graph_output():
            return Carrier(linear)
    return None


def vectors_of(norm: ir.Node) -> list[int]:
    """The inputs of a norm that are its weight and bias; none where it is no norm.

    A norm that is spelled out ends in a product with its weight.
    """
    if norm.op_type in _NORMS:
        places = [place for place in range(1, len(norm.inputs)) if norm.inputs[place] is not None]
        return places if all(_is_vector(norm.inputs[place]) for place in places) else []
    if norm.op_type != "Mul":
        return []
    return [place for place in (0, 1) if _is_vector(norm.inputs[place])]


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(value.shape or ()) == 1
