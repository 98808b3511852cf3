"""Decoder graphs that write their cache in place, in buffers of a fixed size.

The exporter's graphs return a longer cache at every step, so an engine built from one would copy the whole
cache. TensorRT from 10.15 can write new keys and values into a buffer (`TensorScatter`, opset 24). In the
exporter's graphs P, the number of tokens held, is a dimension. Here it is the value of an input: a value of
shape [.., P + S] becomes one of shape [.., C], of which the first P + S columns are used. No shape depends on
a value.

Unused columns are hidden by the exporter's mask, which is now computed from that input. Two other ways were
tried. Parsers of TensorRT that know `TensorScatter` silently ignore Attention's `nonpad_kv_seqlen`, and the
meaning of `is_causal` with it differs between versions. TensorRT-RTX 1.7 cannot compile a boolean mask that
several layers share.

The module knows the patterns in which the exporter writes masks and scores. A graph with any other node that
reads the cache is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from visprune.cache_names import PAST as PAST_PREFIX
from visprune.engines import patterns
from visprune.engines.nodes import Nodes
from visprune.engines.patterns import MOVES, PAST, TOTAL, column_axis, find_producer, rank
from visprune.errors import EngineError

__all__ = ["write_in_place"]

_OPSET = 24  # the first opset with TensorScatter
# Operators that treat each column alone, or move all columns: right for P + S columns, they are right for C.
_COLUMNWISE = MOVES | {"Add", "Greater", "Max", "ReduceMax", "ReduceMean", "ReduceSum"}
_COLUMNWISE |= {"Slice", "Transpose", "Where"}


def write_in_place(model: ir.Model, nodes: Nodes, name: str, capacity: int) -> None:
    """Change a decoder graph to write its cache in place; see `rewrite_graph.prepare`.

    The caller sorts the graph afterwards.

    Args:
        model: A model that the exporter wrote.
        nodes: Adds nodes to its graph.
        name: Name of the graph, for messages.
        capacity: C.

    Raises:
        EngineError: The graph has no cache, or reads it in an unknown way.
    """
    graph = model.graph
    columns = _Columns(nodes, capacity)
    found = [value for value in graph.inputs if _is_past(value)]
    if not found:
        raise EngineError(
            f"{name} has no cache to be written in place.", "Copy the bundle again, or export it again."
        )
    for node in tuple(graph):
        columns.mask(node)
    for node in tuple(graph):
        columns.rewrite(node)
    RemoveUnusedNodesPass()(model)
    for node in columns.unknown_readers():
        raise EngineError(
            f"The cache of {name} cannot be written in place: node {node.name!r} ({node.op_type}) reads it "
            "in an unknown way.",
            "Export the model again with this visprune; if that does not help, report this message.",
        )
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        _make_static(value, capacity)
    graph.inputs.append(columns.length)
    model.opset_imports[""] = _OPSET


class _Columns:
    """Rewrites nodes that have P + S columns so that they have C.

    Args:
        nodes: Adds nodes to the decoder's graph.
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
        self.places = nodes.add("Add", rows, self.length)  # [S]: the column of each new token
        self.filled = nodes.add("Less", self.columns, nodes.add("Add", new, self.length))  # [C]: used columns
        self.masked: set[ir.Node] = set()

    def mask(self, node: ir.Node) -> None:
        """If a node computes attention, make sure that unused columns are masked."""
        if node.op_type == "Attention" and len(node.inputs) > 3 and patterns.is_causal(node.inputs[3]):
            self.masked.add(node)
        scores = node.inputs[0] if node.op_type == "Softmax" else None
        if scores is not None and column_axis(scores) == rank(scores) - 1 == patterns.axis_of(node):
            self.masked.add(node)
            if not patterns.is_masked(scores):  # no mask: every row sees all P + S columns
                assert scores.dtype is not None
                nothing = self.nodes.number(-np.inf, scores.dtype.numpy())
                hidden = self.nodes.add("Where", self.filled, scores, nothing)
                hidden.type, hidden.shape = scores.type, scores.shape
                node.replace_input_with(0, hidden)

    def rewrite(self, node: ir.Node) -> None:
        """If a node is of a known kind, replace P by the value of the input and P + S by C."""
        nodes, first = self.nodes, node.inputs[0] if node.inputs else None
        columns = column_axis(first)
        if node.op_type == "Concat":
            if column_axis(node.outputs[0]) == patterns.axis_of(node) and _is_past(first):
                added = nodes.add("TensorScatter", first, node.inputs[1], self.length, axis=-2, mode="linear")
                nodes.replace(node.outputs[0], added)
            for index, value in enumerate(node.inputs):  # a size in a shape
                if patterns.as_count(value) == (0, 1, 1):
                    node.replace_input_with(index, self.capacity)
        elif node.op_type == "Range" and patterns.is_range(node.outputs[0], (0, 1, 1)):
            node.outputs[0].replace_all_uses_with(self.columns)
        elif node.op_type == "Add":
            for index, value in enumerate(node.inputs):
                other = node.inputs[1 - index]
                if patterns.as_count(value) == (0, 1, 0) and patterns.as_count(other) is None:
                    node.replace_input_with(index, self.length)
        elif node.op_type == "Slice" and columns is not None and patterns.takes_new_columns(node):
            nodes.replace(node.outputs[0], nodes.add("Gather", first, self.places, axis=columns))

    def unknown_readers(self) -> Iterator[ir.Node]:
        """Yield the nodes that read the cache, or a value with P + S columns, in an unknown way."""
        for node in self.nodes.graph:
            if node in self.nodes.made:
                continue
            reads_past = any(map(_is_past, node.inputs))
            if reads_past or not all(self._is_known(node, i) for i in range(len(node.inputs))):
                yield node

    def _is_known(self, node: ir.Node, index: int) -> bool:
        """Check that an input of a node has no such columns, or that the node uses them in a known way."""
        value = node.inputs[index]
        columns, last = column_axis(value), rank(value) - 1
        if columns is None:
            return True
        remain = all(column_axis(output) is not None for output in node.outputs)
        if node.op_type in ("Attention", "Softmax"):
            return node in self.masked
        if node.op_type == "MatMul" and index == 0:  # it sums over columns, so unused ones must be 0
            return columns == last and find_producer("Softmax", value) is not None
        if node.op_type == "MatMul":
            return remain if columns == last else column_axis(node.inputs[0]) is not None
        return node.op_type in _COLUMNWISE and remain


def _is_past(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and str(value.name).startswith(PAST_PREFIX)


def _make_static(value: ir.Value, capacity: int) -> None:
    """Replace the dimensions P and P + S of a value by C."""
    if value.shape is not None:
        sizes = [capacity if patterns.terms(dim) in (PAST, TOTAL) else dim for dim in value.shape]
        value.shape = ir.Shape(sizes)
