"""ONNX Runtime's optimizer makes an integer kernel of every quantized layer, which is what makes it fast."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import drawn, ir, model, node, onnx, planned, session, settings, write

from visprune.quantize.linears import find_linears

KERNELS = {
    "int8": {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm"},
    "int8-dynamic": {"DynamicQuantizeMatMul"},
    "int8-weights": {"MatMulNBits"},
    "int4": {"MatMulNBits"},
}
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"}


def optimized(path, folder):
    """Return the nodes of the optimized graph that the runtime runs."""
    written = folder / f"{path.stem}.optimized.onnx"
    session(path, written=written)
    return onnx.load(written, load_external_data=False).graph


def kernels(graph, precision):
    """Count the kernels of a precision, and those of the head."""
    return sum(one.op_type in KERNELS[precision] | KERNELS["int8-weights"] for one in graph.node)


def float_products(graph):
    """Return the float products left: those whose second operand is a weight, or is computed from one."""
    constants = {one.name for one in graph.initializer}
    read = {one.output[0] for one in graph.node if one.op_type == "DequantizeLinear"}
    return [
        one.name or one.op_type
        for one in graph.node
        if one.op_type in PRODUCTS and (set(one.input[:2]) & (constants | read))
    ]


@pytest.mark.parametrize("precision", KERNELS)
def test_no_layer_of_the_demo_model_is_left_to_float(precision, demo, demo_in, tmp_path):
    bundle = demo_in(precision)
    for name, graph in bundle.manifest.graphs.items():
        linears = find_linears(ir.load(demo.file(demo.manifest.graphs[name].file)).graph)
        runs = optimized(bundle.file(graph.file), tmp_path)
        assert kernels(runs, precision) == len(linears), name
        assert float_products(runs) == [], name
        assert not [one.name for one in runs.node if one.op_type == "DequantizeLinear"], name


def test_the_float_bundle_has_products(demo, tmp_path):
    """`float_products` finds the products of a float bundle."""
    found = [
        float_products(optimized(demo.file(graph.file), tmp_path)) for graph in demo.manifest.graphs.values()
    ]
    assert sum(map(len, found)) == 48


GRAPHS = {
    "flat": ({"x": ["S", 32]}, [node("Gemm", ["x", "a", "b"], ["y"])]),
    "flat, of two nodes": (
        {"x": ["S", 32]},
        [node("MatMul", ["x", "a"], ["p"]), node("Add", ["p", "b"], ["y"])],
    ),
    "flat, without bias": ({"x": ["S", 32]}, [node("MatMul", ["x", "a"], ["y"])]),
    "with a batch": (
        {"x": ["B", "S", 32]},
        [node("MatMul", ["x", "a"], ["p"]), node("Add", ["p", "b"], ["y"])],
    ),
    "with a residual": (
        {"x": ["B", "S", 32], "r": ["B", "S", 16]},
        [
            node("MatMul", ["x", "a"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("Add", ["r", "q"], ["y"]),
        ],
    ),
    "with a function": (
        {"x": ["B", "S", 32]},
        [
            node("MatMul", ["x", "a"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("Gelu", ["q"], ["y"]),
        ],
    ),
    "of one input": (
        {"x": ["B", "S", 32]},
        [
            node("MatMul", ["x", "a"], ["p"]),
            node("MatMul", ["x", "c"], ["q"]),
            node("MatMul", ["x", "d"], ["r"]),
            node("Sum", ["p", "q", "r"], ["y"]),
        ],
    ),
    "of one input, behind a norm": (
        {"z": ["B", "S", 32]},
        [
            node("LayerNormalization", ["z", "g"], ["x"]),
            node("MatMul", ["x", "a"], ["p"]),
            node("MatMul", ["x", "c"], ["q"]),
            node("Mul", ["p", "q"], ["y"]),
        ],
    ),
}
CONSTANTS = {"a": drawn(32, 16), "c": drawn(32, 16, seed=1), "d": drawn(32, 16, seed=2)}
CONSTANTS |= {"b": drawn(16), "g": np.abs(drawn(32))}


@pytest.mark.parametrize("precision", KERNELS)
@pytest.mark.parametrize("case", GRAPHS)
def test_layers_of_every_surrounding_become_kernels(case, precision, tmp_path):
    inputs, nodes = GRAPHS[case]
    read = {name for one in nodes for name in one.input}
    constants = {name: array for name, array in CONSTANTS.items() if name in read}
    layers = [name for name in "acd" if name in read]
    plan = planned(precision, dict.fromkeys(layers, 0.02 if precision == "int8" else None))
    path = write(model(nodes, inputs, ["y"], constants), plan, settings(precision), tmp_path)
    runs = optimized(path, tmp_path)
    assert kernels(runs, precision) == len(layers)
    assert float_products(runs) == []
