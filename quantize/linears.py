"""The linear layers of a graph.

A linear layer is a `MatMul` or `Gemm` whose second operand is a two-dimensional weight, together with the
bias that is added to it, if any. Other products (attention, convolutions) are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.errors import BundleError

__all__ = ["Linear", "find_linears", "part_of", "read_weight"]

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear layer y = x W + b, with x [..., K], W [K, N] and b [N].

    Attributes:
        name: Name of the weight, without the suffix that says how it is stored.
        y: The output, bias included.
        weight: The weight, as the graph holds it.
        bias: The bias, as the graph holds it; None if there is none.
        nodes: The nodes that compute the layer, in order. They are replaced together.
        transposed: Whether the weight is held as [N, K].
    """

    name: str
    y: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]
    transposed: bool

    @property
    def x(self) -> ir.Value:
        """The input, as the graph has it now."""
        x = self.nodes[0].inputs[0]
        assert x is not None
        return x

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        first, second = _shape(self.weight).numpy()
        return (second, first) if self.transposed else (first, second)

    def read(self) -> Array:
        """Read W, [K, N] float32, from its file. Nothing else keeps a reference to the array."""
        array = read_weight(self.weight)
        return np.ascontiguousarray(array.T) if self.transposed else array

    def read_bias(self) -> Array | None:
        """Read b, [N] float32."""
        return None if self.bias is None else read_weight(self.bias)


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Return the linear layers of a graph in the order of its nodes, with unique names."""
    found: list[Linear] = []
    names: set[str] = set()
    for node in graph:
        linear = _linear(node)
        if linear is None:
            continue
        name, count = linear.name, 1
        while name in names:  # two layers may share a weight
            count += 1
            name = f"{linear.name}#{count}"
        names.add(name)
        found.append(replace(linear, name=name))
    return found


def part_of(graph: str, linear: str) -> str:
    """Return the part of the model that a linear layer belongs to: vision, projector, decoder or head."""
    if graph == "vision_encoder":
        return "vision"
    if graph == "token_pruner":
        return "projector"
    return "head" if linear.startswith("lm_head") else "decoder"


def _linear(node: ir.Node) -> Linear | None:
    """Return the linear layer that a node computes, or None."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not weight.is_initializer() or len(_shape(weight)) != 2:
        return None
    transposed = False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    nodes: tuple[ir.Node, ...] = (node,)
    y = node.outputs[0]
    if node.op_type == "Gemm":
        if not _is_plain(node) or not (bias is None or (bias.is_initializer() and len(_shape(bias)) == 1)):
            return None
        transposed = bool(_integer(node, "transB"))
    elif (added := _bias_of(y)) is not None:
        add, bias = added
        nodes, y = (node, add), add.outputs[0]
    name = str(weight.name).removesuffix(".T").removesuffix(".weight")
    return Linear(name, y, weight, bias, nodes, transposed)


def _is_plain(gemm: ir.Node) -> bool:
    """Check that a `Gemm` computes x W + b or x W^T + b: no factors, x not transposed."""
    factors = (gemm.attributes.get(name) for name in ("alpha", "beta"))
    return not _integer(gemm, "transA") and all(f is None or f.as_float() == 1.0 for f in factors)


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _bias_of(product: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the `Add` that adds a bias to a product, and the bias, if that `Add` is its only reader."""
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    if other is None or not other.is_initializer() or len(_shape(other)) != 1:
        return None
    return uses[0].node, other


def _shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return value.shape


def read_weight(value: ir.Value) -> Array:
    """Read the numbers of an initializer as float32.

    Raises:
        BundleError: They cannot be read, or some are not finite.
    """
    assert value.const_value is not None
    try:
        array: Array = value.const_value.numpy().astype(np.float32)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{value.name} cannot be read: {error}.", "Copy the bundle again, or export it again."
        ) from None
    if not np.isfinite(array).all():
        raise BundleError(f"{value.name} holds numbers that are not finite.", "Check the checkpoint.")
    return array
