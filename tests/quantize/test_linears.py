"""Nodes that are linear layers, and nodes that are not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import drawn, model, node

from visprune.quantize.linears import find_linears, part_of

X = {"x": ["B", "S", 8]}
W, B = drawn(8, 4), drawn(4)


def found(nodes, constants, inputs=X, outputs=("y",)):
    return find_linears(model(nodes, inputs, outputs, constants).graph)


def test_a_product_alone():
    (linear,) = found([node("MatMul", ["x", "layer.weight"], ["y"])], {"layer.weight": W})
    assert (linear.name, linear.x.name, linear.y.name) == ("layer", "x", "y")
    assert linear.shape == (8, 4)
    assert linear.bias is None
    assert linear.read_bias() is None
    np.testing.assert_array_equal(linear.read(), W)


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_and_its_bias(turned):
    inputs = ["b", "p"] if turned else ["p", "b"]
    nodes = [node("MatMul", ["x", "w.T"], ["p"]), node("Add", inputs, ["y"])]
    (linear,) = found(nodes, {"w.T": W, "b": B})
    assert (linear.name, linear.y.name) == ("w", "y")
    assert [each.op_type for each in linear.nodes] == ["MatMul", "Add"]
    np.testing.assert_array_equal(linear.read_bias(), B)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gemm(transposed, biased):
    stored = np.ascontiguousarray(W.T) if transposed else W
    inputs = ["x", "w.weight", "b"] if biased else ["x", "w.weight"]
    constants = {"w.weight": stored, "b": B} if biased else {"w.weight": stored}
    (linear,) = found(
        [node("Gemm", inputs, ["y"], transB=int(transposed), alpha=1.0)], constants, {"x": ["S", 8]}
    )
    assert linear.shape == (8, 4)
    assert linear.transposed == transposed
    np.testing.assert_array_equal(linear.read(), W)
    assert linear.read().flags.c_contiguous
    assert (linear.bias is not None) == biased


NO_LAYERS = {
    "gemm with alpha": (node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5), {"w": W, "b": B}, {"x": ["S", 8]}),
    "gemm with beta": (node("Gemm", ["x", "w", "b"], ["y"], beta=2.0), {"w": W, "b": B}, {"x": ["S", 8]}),
    "gemm of a transposed input": (node("Gemm", ["x", "w"], ["y"], transA=1), {"w": W}, {"x": [8, "S"]}),
    "gemm with a bias that is no vector": (
        node("Gemm", ["x", "w", "b"], ["y"]),
        {"w": W, "b": drawn(1, 4)},
        {"x": ["S", 8]},
    ),
    "two activations": (node("MatMul", ["x", "z"], ["y"]), {}, {"x": ["S", 8], "z": [8, 4]}),
    "a weight of three dimensions": (node("MatMul", ["x", "w"], ["y"]), {"w": drawn(2, 8, 4)}, X),
    "a weight of one dimension": (node("MatMul", ["x", "w"], ["y"]), {"w": drawn(8)}, X),
    "a weight on the left": (node("MatMul", ["w", "x"], ["y"]), {"w": drawn(4, 5)}, {"x": [5, 8]}),
    "another operator": (node("Mul", ["x", "w"], ["y"]), {"w": drawn(8)}, X),
}


@pytest.mark.parametrize("case", NO_LAYERS)
def test_what_is_no_linear_layer(case):
    it, constants, inputs = NO_LAYERS[case]
    assert found([it], constants, inputs) == []


@pytest.mark.parametrize(
    ("other", "inputs"),
    [("z", {"z": ["B", "S", 4]}), ("b", {})],
    ids=["an activation", "no vector"],
)
def test_a_sum_that_is_no_bias_stays(other, inputs):
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", other], ["y"])]
    constants = {"w": W} if inputs else {"w": W, "b": drawn(3, 4)}
    (linear,) = found(nodes, constants, X | inputs)
    assert linear.y.name == "p"
    assert linear.bias is None
    assert len(linear.nodes) == 1


def test_a_product_that_something_else_reads_keeps_its_bias_apart():
    product = node("MatMul", ["x", "w"], ["p"])
    add, other = node("Add", ["p", "b"], ["y"]), node("Relu", ["p"], ["r"])
    (linear,) = found([product, add, other], {"w": W, "b": B}, outputs=("y", "r"))
    assert linear.y.name == "p"
    (linear,) = found([product, add], {"w": W, "b": B}, outputs=("y", "p"))
    assert linear.y.name == "p"


def test_a_shared_weight_has_two_names():
    nodes = [node("MatMul", ["x", "tied.weight"], ["p"]), node("Relu", ["p"], ["r"])]
    nodes += [node("MatMul", ["x", "tied.weight"], ["q"]), node("Add", ["r", "q"], ["y"])]
    assert [linear.name for linear in found(nodes, {"tied.weight": W})] == ["tied", "tied#2"]


def test_float16_is_read_as_float32():
    constants = {"w": W.astype(np.float16), "b": B.astype(np.float16)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])]
    (linear,) = find_linears(model(nodes, X, ["y"], constants, "float16").graph)
    assert linear.read().dtype == linear.read_bias().dtype == np.float32
    np.testing.assert_array_equal(linear.read(), constants["w"].astype(np.float32))


@pytest.mark.parametrize(
    ("graph", "linear", "part"),
    [
        ("vision_encoder", "tower.layers.0.mlp.fc1", "vision"),
        ("token_pruner", "linear_1", "projector"),
        ("decoder_model_merged", "layers.0.mlp.up_proj", "decoder"),
        ("decoder_segment_1", "layers.0.mlp.up_proj", "decoder"),
        ("decoder_model_merged", "lm_head", "head"),
    ],
)
def test_parts(graph, linear, part):
    assert part_of(graph, linear) == part
