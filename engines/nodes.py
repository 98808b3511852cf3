"""Helper that adds nodes to an existing graph."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["Nodes"]


class Nodes:
    """Adds nodes and constants to a graph, in any order. The caller sorts the graph afterwards.

    Attributes:
        graph: The graph.
        made: The nodes that were added.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: set[ir.Node] = set()
        self._numbers = itertools.count()

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: int | str) -> ir.Value:
        """Add a node, and return its output."""
        kinds = {int: ir.AttributeType.INT, str: ir.AttributeType.STRING}
        named = [ir.Attr(name, kinds[type(value)], value) for name, value in attributes.items()]
        node = ir.Node("", operator, inputs, named, name=self._name(operator))
        node.outputs[0].name = node.name
        self.graph.append(node)
        self.made.add(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Add a `Cast`, and return the value in the other type."""
        return self.add("Cast", value, to=dtype.value)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """Add an initializer that holds an array."""
        tensor = ir.tensor(array, name=self._name("constant"))
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def number(self, number: float, dtype: Any = np.int64) -> ir.Value:
        """Add an initializer that holds a scalar."""
        return self.constant(np.array(number, dtype))

    def numbers(self, *numbers: int) -> ir.Value:
        """Add an initializer that holds a vector of integers, such as axes or a shape: [n] int64."""
        return self.constant(np.array(numbers, np.int64))

    def replace(self, old: ir.Value, made: ir.Value) -> None:
        """Make all readers of a value read another one instead, which takes its name."""
        made.type, made.shape = old.type, old.shape
        name, old.name = old.name, f"{old.name}.replaced"
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        made.name = name

    def _name(self, operator: str) -> str:
        return f"engine.{operator}.{next(self._numbers)}"
