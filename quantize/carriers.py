"""Places where the per-channel factors of an activation can be folded in, so that they cost no time to run.

SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) divide the channels of an activation by factors and
multiply the rows of the weights that read it by the same factors: x W = (x / s) (s W). The division can be
folded into one of two places:

    norm       the weight (and bias) of the norm whose output is x
    product    x = a * b, where b is the output of a linear layer: the columns of that layer's weight. In a
               gated MLP, `up_proj` carries the factors of `down_proj`

This is possible only if nothing but linear layers reads x: any other reader would see it divided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from visprune.quantize.linears import Linear

__all__ = ["Carrier", "find_carrier", "norm_vectors"]

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True, eq=False)
class Carrier:
    """The place that carries the factors of an activation.

    Attributes:
        linear: The linear layer whose columns and bias are divided by the factors; None if the norm before
            the activation carries them.
    """

    linear: Linear | None = None


def find_carrier(
    x: ir.Value, readers: Collection[Linear], by_output: Mapping[ir.Value, Linear]
) -> Carrier | None:
    """Find the place that can carry the factors of an activation.

    Args:
        x: The activation.
        readers: All linear layers that read it.
        by_output: The linear layers of the graph, by their outputs.

    Returns:
        The place, or None if there is none.
    """
    ours = {linear.nodes[0] for linear in readers}
    node = x.producer()
    if node is None or x.is_graph_output() or any(use.node not in ours for use in x.uses()):
        return None
    if norm_vectors(node):
        return Carrier()
    for factor in reversed(node.inputs) if node.op_type == "Mul" else ():
        linear = by_output.get(factor) if factor is not None else None
        if linear is not None and len(list(linear.y.uses())) == 1 and not linear.y.is_graph_output():
            return Carrier(linear)
    return None


def norm_vectors(norm: ir.Node) -> list[int]:
    """Return the indices of the inputs that are a norm's weight and bias; an empty list for other nodes.

    A norm that is exported as single operators ends in a `Mul` with its weight, so such a `Mul` counts.
    """
    if norm.op_type in _NORMS:
        places = [place for place in range(1, len(norm.inputs)) if norm.inputs[place] is not None]
        return places if all(_is_vector(norm.inputs[place]) for place in places) else []
    if norm.op_type != "Mul":
        return []
    return [place for place in (0, 1) if _is_vector(norm.inputs[place])]


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(value.shape or ()) == 1
