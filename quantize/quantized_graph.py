"""Quantized graphs: the linear layers of a float graph replaced by quantized ones, and the result saved.

Layers change as their choices say, norms that carry factors get new weights, and the rest is copied. Each
weight is read from the float bundle's files, rounded, written and freed, one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.errors import BundleError
from visprune.manifest import Graph
from visprune.quantize.carriers import norm_vectors
from visprune.quantize.forms import FORMS, MICROSOFT, Builder, Weight, number_format
from visprune.quantize.layer_choices import GraphChoices
from visprune.quantize.linears import Linear, find_linears, read_weight
from visprune.quantize.quantize_options import FLOAT, ResolvedOptions

__all__ = ["quantize_embedding", "write_quantized"]

# As in an export: smaller tensors stay inside the graph's file, where optimizers of graphs can see them.
_EXTERNAL_BYTES = 1024
# `DequantizeLinear` has 4-bit integers and blocks from this opset on. Of the operators of an export, none
# computes something else in it than in the opset of a target.
_INT4_OPSET = 21


def write_quantized(
    model: ir.Model,
    choices: GraphChoices,
    resolved: ResolvedOptions,
    folder: Path,
    graph: Graph,
) -> Graph:
    """Write a graph with its linear layers quantized as chosen.

    Args:
        model: The float graph, freshly loaded. It is changed.
        choices: The choices for this graph.
        resolved: The options, as resolved for the bundle.
        folder: Directory of the new bundle.
        graph: Files and interface of the float graph.

    Returns:
        The files of the new graph, with the same interface.
    """
    builder = Builder(model.graph, resolved.numpy_dtype, resolved.for_engines, resolved.block_size)
    _divide_norms(builder, choices)
    for linear in find_linears(model.graph):
        layer = choices.layers[linear.name]
        has_factors = linear.name in choices.rows or linear.name in choices.columns
        if layer.precision != FLOAT or has_factors:
            _replace_layer(builder, linear, choices)
    if resolved.for_engines and any(layer.precision == "int4" for layer in choices.layers.values()):
        model.opset_imports[""] = max(model.opset_imports[""], _INT4_OPSET)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports.setdefault(MICROSOFT, 1)
    return _save(model, folder, graph)


def quantize_embedding(model: ir.Model, resolved: ResolvedOptions, folder: Path, graph: Graph) -> Graph:
    """Write the embedding graph with its token table [V, D] as int8, and with a scale for each token.

    See `write_quantized` for the arguments and the result.

    Raises:
        BundleError: The graph has no token table.
    """
    node = next(
        (node for node in model.graph if node.op_type == "Gather" and _is_table(node.inputs[0])), None
    )
    if node is None:
        raise BundleError("The embedding graph has no token table.", "Export the model again.")
    table, ids = node.inputs[0], node.inputs[1]
    assert table is not None
    assert table.const_value is not None
    name = str(table.name)
    shape = tuple(table.const_value.shape.numpy())
    builder = Builder(model.graph, resolved.numpy_dtype, shares=False, block=resolved.block_size)

    def load() -> NDArray[Any]:
        return read_weight(table).T  # [D, V]: a scale for each column is one for each token

    stored = Weight(load, number_format("int8", resolved.block_size), builder.dtype)
    kind = ir.DataType.from_numpy(builder.dtype)
    scales = builder.lazy(f"{name}.scales", kind, (shape[0], 1), lambda: stored.scales()[:, None])
    numbers = builder.lazy(f"{name}.quantized", ir.DataType.INT8, shape, lambda: _transposed(stored.stored()))
    row = builder.node("Cast", builder.node("Gather", numbers, ids), to=kind.value)
    made = builder.node("Mul", row, builder.node("Gather", scales, ids))
    _replace_node(builder, node, node.outputs[0], made)
    return _save(model, folder, graph)


def _is_table(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(value.shape or ()) == 2


def _transposed(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array.T)


def _divide_norms(builder: Builder, choices: GraphChoices) -> None:
    """Replace the weights of norms that carry factors by weights divided by them."""
    outputs = {value.name: node for node in builder.graph for value in node.outputs}
    for name, factors in choices.norms.items():
        norm = outputs[name]
        for place in norm_vectors(norm):
            vector = norm.inputs[place]
            assert vector is not None
            assert vector.const_value is not None
            divided = (vector.const_value.numpy().astype(np.float32) / factors).astype(builder.dtype)
            norm.replace_input_with(place, builder.constant(f"{name}.divided.{place}", divided))


def _replace_layer(builder: Builder, linear: Linear, choices: GraphChoices) -> None:
    """Replace a linear layer by its quantized form, or by a float one with its factors applied."""
    layer = choices.layers[linear.name]
    rows, columns = choices.rows.get(linear.name), choices.columns.get(linear.name)

    def load() -> NDArray[Any]:
        weight = linear.read()
        weight = weight if rows is None else rows[:, None] * weight
        return weight if columns is None else weight / columns

    bias = linear.bias
    if bias is not None and columns is not None:
        divided = linear.read_bias()
        assert divided is not None
        bias = builder.constant(f"{linear.name}.bias.divided", (divided / columns).astype(builder.dtype))
    if layer.precision == FLOAT:
        kind = ir.DataType.from_numpy(builder.dtype)
        weight = builder.lazy(
            f"{linear.name}.weight.factored", kind, linear.shape, lambda: load().astype(builder.dtype)
        )
        made = builder.biased(builder.node("MatMul", linear.x, weight), bias)
    else:
        stored = Weight(load, number_format(layer.precision, builder.block), builder.dtype)
        made = FORMS[layer.precision](builder, linear, stored, bias, layer.scale)
    _replace_node(builder, linear.nodes[-1], linear.y, made)
    for node in reversed(linear.nodes[:-1]):
        builder.graph.remove(node, safe=True)


def _replace_node(builder: Builder, node: ir.Node, old: ir.Value, made: ir.Value) -> None:
    """Insert the builder's nodes in place of a node.

    All readers of the node's output `old` read `made` instead, which takes its name.
    """
    builder.graph.insert_before(node, builder.nodes)
    builder.nodes.clear()
    made.type, made.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}.float"
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    made.name = name
    builder.graph.remove(node, safe=True)


def _save(model: ir.Model, folder: Path, graph: Graph) -> Graph:
    """Save a changed graph under the names of its files, without initializers that nothing reads any more."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        if not model.graph.initializers[name].is_graph_output():
            del model.graph.initializers[name]
    file = folder / graph.file
    file.parent.mkdir(parents=True, exist_ok=True)
    data = f"{file.name}_data"
    ir.save(model, file, external_data=data, size_threshold_bytes=_EXTERNAL_BYTES)
    has_data = (file.parent / data).is_file()
    return Graph(
        graph.file, str(Path(graph.file).with_name(data)) if has_data else None, graph.inputs, graph.outputs
    )
