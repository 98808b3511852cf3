"""Write a graph with its linear layers quantized, one weight at a time.

Layers change as their plan says; norms that carry factors get new weights; the rest is copied. Weights are
read from the float bundle's files, rounded, written, and forgotten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.errors import BundleError
from visprune.manifest import Graph
from visprune.quantize.carriers import vectors_of
from visprune.quantize.forms import FORMS, MICROSOFT, Builder, Weight, number_format
from visprune.quantize.layer_choices import GraphPlan
from visprune.quantize.linears import Linear, find_linears, read_weight
from visprune.quantize.quantize_options import FLOAT, Settings

__all__ = ["quantize_embedding", "write_quantized"]

# As at export: small tensors stay inside the file, where graph optimisers can see them.
_EXTERNAL_BYTES = 1024


def write_quantized(
    model: ir.Model,
    plan: GraphPlan,
    settings: Settings,
    folder: Path,
    graph: Graph,
) -> Graph:
    """Write a graph as planned.

    Args:
        model: The float graph, freshly loaded; it is changed.
        plan: Of this graph.
        settings: What was asked for.
        folder: The new bundle's directory.
        graph: The float graph's files and interface.

    Returns:
        Its files; the interface is the same.
    """
    builder = Builder(model.graph, settings.numpy_dtype, settings.for_engines, settings.block_size)
    _divide_norms(builder, plan)
    for linear in find_linears(model.graph):
        layer = plan.layers[linear.name]
        changed = linear.name in plan.rows or linear.name in plan.columns
        if layer.precision != FLOAT or changed:
            _replace(builder, linear, plan)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports.setdefault(MICROSOFT, 1)
    return _save(model, folder, graph)


def quantize_embedding(model: ir.Model, settings: Settings, folder: Path, graph: Graph) -> Graph:
    """Write the embedding graph with its token table [V, D] as int8 and a scale for each token.

    Raises:
        BundleError: The graph has no table.
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
    builder = Builder(model.graph, settings.numpy_dtype, shares=False, block=settings.block_size)

    def load() -> NDArray[Any]:
        return read_weight(table).T  # a token is a column

    stored = Weight(load, number_format("int8", settings.block_size), builder.dtype)
    kind = ir.DataType.from_numpy(builder.dtype)
    scales = builder.lazy(f"{name}.scales", kind, (shape[0], 1), lambda: stored.scales()[:, None])
    numbers = builder.lazy(f"{name}.quantized", ir.DataType.INT8, shape, lambda: _rows(stored.stored()))
    row = builder.node("Cast", builder.node("Gather", numbers, ids), to=kind.value)
    made = builder.node("Mul", row, builder.node("Gather", scales, ids))
    _put(builder, node, node.outputs[0], made)
    return _save(model, folder, graph)


def _is_table(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(value.shape or ()) == 2


def _rows(columns: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(columns.T)


def _divide_norms(builder: Builder, plan: GraphPlan) -> None:
    """Give norms that carry factors weights of their own, divided."""
    outputs = {value.name: node for node in builder.graph for value in node.outputs}
    for name, factors in plan.norms.items():
        norm = outputs[name]
        for place in vectors_of(norm):
            vector = norm.inputs[place]
            assert vector is not None
            assert vector.const_value is not None
            divided = (vector.const_value.numpy().astype(np.float32) / factors).astype(builder.dtype)
            norm.replace_input_with(place, builder.constant(f"{name}.divided.{place}", divided))


def _replace(builder: Builder, linear: Linear, plan: GraphPlan) -> None:
    """Put a layer's quantized form where the layer is."""
    layer = plan.layers[linear.name]
    rows, columns = plan.rows.get(linear.name), plan.columns.get(linear.name)

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
        made = builder.biased(builder.node("MatMul", linear.x, weight), linear, bias)
    else:
        stored = Weight(load, number_format(layer.precision, builder.block), builder.dtype)
        made = FORMS[layer.precision](builder, linear, stored, bias, layer.scale)
    _put(builder, linear.nodes[-1], linear.y, made)
    for node in reversed(linear.nodes[:-1]):
        builder.graph.remove(node, safe=True)


def _put(builder: Builder, node: ir.Node, old: ir.Value, made: ir.Value) -> None:
    """Everything that read a node's output reads what was made, under the same name; the node goes."""
    builder.graph.insert_before(node, builder.nodes)
    builder.nodes.clear()
    made.type, made.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}.float"
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    made.name = name
    builder.graph.remove(node, safe=True)


def _save(model: ir.Model, folder: Path, graph: Graph) -> Graph:
    """Write a changed graph under its old names, without the weights that nothing reads any more."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        if not model.graph.initializers[name].is_graph_output():
            del model.graph.initializers[name]
    file = folder / graph.file
    file.parent.mkdir(parents=True, exist_ok=True)
    data = f"{file.name}_data"
    ir.save(model, file, external_data=data, size_threshold_bytes=_EXTERNAL_BYTES)
    there = (file.parent / data).is_file()
    return Graph(
        graph.file, str(Path(graph.file).with_name(data)) if there else None, graph.inputs, graph.outputs
    )
