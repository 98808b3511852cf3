"""A decoder graph whose cache is written in place, in buffers of a fixed size.

The exporter's graphs put out a longer cache at every step: an engine of theirs would copy all of it.
TensorRT from 10.15 can write new keys and values where they belong (`TensorScatter`, opset 24). P, the tokens
held so far, is a dimension in the exporter's graphs; here it is the value of an input, and what was
[.., P + S] becomes [.., C], of which P + S columns count. No shape depends on a value.

What must not count is hidden as it always was, by the exporter's mask, made from that value instead. Other
ways were tried: Attention's `nonpad_kv_seqlen` is passed over in silence by parsers of TensorRT that know
`TensorScatter`, and what `is_causal` means then differs between versions; a boolean mask that several layers
share is more than TensorRT-RTX 1.7 can compile.

Knows how the exporter spells masks and scores. What else reads the cache is refused, and not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from visprune.engines import patterns
from visprune.engines.nodes import Nodes
from visprune.engines.patterns import HELD, MOVES, PAST, axis, made_by, rank
from visprune.errors import EngineError

__all__ = ["write_in_place"]

_OPSET = 24  # the first with TensorScatter
# What works on each column by itself, or moves all of them, is right for C columns where it was for P + S.
_COLUMNWISE = MOVES | {"Add", "Greater", "Max", "ReduceMax", "ReduceMean", "Slice", "Transpose", "Where"}


def write_in_place(model: ir.Model, nodes: Nodes, name: str, capacity: int) -> None:
    """Change a decoder graph; see `rewrite.prepare`. The graph is to be sorted afterwards.

    Args:
        model: Of the exporter.
        nodes: Adds to its graph.
        name: The graph's, for people.
        capacity: C.

    Raises:
        EngineError: The graph has no cache, or reads it in a way that is not known.
    """
    graph = model.graph
    columns = _Columns(nodes, capacity)
    found = [value for value in graph.inputs if _is_past(value)]
    if not found:
        raise EngineError(
            f"{name} has no cache to be written in place.", "Copy the bundle again, or export it again."
        )
    for node in tuple(graph):
        columns.hide(node)
    for node in tuple(graph):
        columns.move(node)
    RemoveUnusedNodesPass()(model)
    for node in columns.unknown():
        raise EngineError(
            f"The cache of {name} cannot be written in place: nothing is known of node {node.name!r} "
            f"({node.op_type}), which reads it.",
            "Export the model again with this visprune; if that does not help, report this message.",
        )
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        _make_static(value, capacity)
    graph.inputs.append(columns.length)
    model.opset_imports[""] = _OPSET


class _Columns:
    """What turns P + S columns into C.

    Args:
        nodes: Adds to the decoder's graph.
        capacity: C.
    """

    def __init__(self, nodes: Nodes, capacity: int) -> None:
        self.nodes = nodes
        self.capacity = nodes.numbers(capacity)
        int64 = ir.TensorType(ir.DataType.INT64)
        self.length = ir.Value(name="cache_length", type=int64, shape=ir.Shape([1]))
        self.columns = nodes.constant(np.arange(capacity))
        new = nodes.add("Shape", nodes.graph.inputs[0], start=1, end=2)  # [1]: S
        rows = nodes.add("Range", nodes.number(0), nodes.add("Squeeze", new), nodes.number(1))
        self.places = nodes.add("Add", rows, self.length)  # [S], where each new token is held
        self.filled = nodes.add("Less", self.columns, nodes.add("Add", new, self.length))  # [C]
        self.masked: set[ir.Node] = set()

    def hide(self, node: ir.Node) -> None:
        """See that attention takes no column that is not filled."""
        if node.op_type == "Attention" and len(node.inputs) > 3 and patterns.is_causal(node.inputs[3]):
            self.masked.add(node)
        scores = node.inputs[0] if node.op_type == "Softmax" else None
        if scores is not None and axis(scores) == rank(scores) - 1 == patterns.over(node):
            self.masked.add(node)
            if not patterns.is_masked(scores):  # a row that saw all P + S
                assert scores.dtype is not None
                nothing = self.nodes.number(-np.inf, scores.dtype.numpy())
                hidden = self.nodes.add("Where", self.filled, scores, nothing)
                hidden.type, hidden.shape = scores.type, scores.shape
                node.replace_input_with(0, hidden)

    def move(self, node: ir.Node) -> None:
        """Have a node take P as a value, if it is of a kind that can, and P + S as C."""
        nodes, first = self.nodes, node.inputs[0] if node.inputs else None
        columns = axis(first)
        if node.op_type == "Concat":
            if axis(node.outputs[0]) == patterns.over(node) and _is_past(first):
                added = nodes.add("TensorScatter", first, node.inputs[1], self.length, axis=-2, mode="linear")
                nodes.replace(node.outputs[0], added)
            for index, value in enumerate(node.inputs):  # of a shape
                if patterns.count(value) == (0, 1, 1):
                    node.replace_input_with(index, self.capacity)
        elif node.op_type == "Range" and patterns.is_range(node.outputs[0], (0, 1, 1)):
            node.outputs[0].replace_all_uses_with(self.columns)
        elif node.op_type == "Add":
            for index, value in enumerate(node.inputs):
                if patterns.count(value) == (0, 1, 0) and patterns.count(node.inputs[1 - index]) is None:
                    node.replace_input_with(index, self.length)
        elif node.op_type == "Slice" and columns is not None and patterns.takes_new(node):
            nodes.replace(node.outputs[0], nodes.add("Gather", first, self.places, axis=columns))

    def unknown(self) -> Iterator[ir.Node]:
        """Nodes that read the cache, or what has a column for each of its tokens, in another way."""
        for node in self.nodes.graph:
            if node in self.nodes.made:
                continue
            reads_past = any(map(_is_past, node.inputs))
            if reads_past or not all(self._is_known(node, i) for i in range(len(node.inputs))):
                yield node

    def _is_known(self, node: ir.Node, index: int) -> bool:
        """Whether an input of a node has no such columns, or they are taken as they should be."""
        value = node.inputs[index]
        columns, last = axis(value), rank(value) - 1
        if columns is None:
            return True
        remain = all(axis(output) is not None for output in node.outputs)
        if node.op_type in ("Attention", "Softmax"):
            return node in self.masked
        if node.op_type == "MatMul" and index == 0:  # columns are added up: nothing hidden may be in them
            return columns == last and made_by("Softmax", value) is not None
        if node.op_type == "MatMul":
            return remain if columns == last else axis(node.inputs[0]) is not None
        return node.op_type in _COLUMNWISE and remain


def _is_past(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and str(value.name).startswith("past_key_values.")


def _make_static(value: ir.Value, capacity: int) -> None:
    """Give a value the size that it now has."""
    if value.shape is not None:
        sizes = [capacity if patterns.terms(dim) in (PAST, HELD) else dim for dim in value.shape]
        value.shape = ir.Shape(sizes)
