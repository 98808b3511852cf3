"""The places that can carry factors of channels; moving factors there does not change the outputs."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import drawn, model, node, run, settings, write

from visprune.quantize.carriers import find_carrier
from visprune.quantize.layer_choices import GraphChoices, LayerChoice
from visprune.quantize.linears import find_linears

X = {"x": ["B", "S", 8]}
GAIN = {"g": np.abs(drawn(8)) + 0.5}
SHIFTED = GAIN | {"shift": drawn(8, seed=1)}
ROOT = [
    node("Mul", ["x", "x"], ["squares"]),
    node("ReduceMean", ["squares", "last"], ["mean"]),
    node("Sqrt", ["mean"], ["root"]),
    node("Div", ["x", "root"], ["normed"]),
]
NORMS = {
    "layer norm": ([node("LayerNormalization", ["x", "g", "shift"], ["h"], axis=-1)], SHIFTED),
    "layer norm without bias": ([node("LayerNormalization", ["x", "g"], ["h"], axis=-1)], GAIN),
    "rms norm": ([node("RMSNormalization", ["x", "g"], ["h"], axis=-1)], GAIN),
    "spelled out": ([*ROOT, node("Mul", ["normed", "g"], ["h"])], GAIN | {"last": np.array([-1])}),
    "spelled out, turned": ([*ROOT, node("Mul", ["g", "normed"], ["h"])], GAIN | {"last": np.array([-1])}),
}
TWO = [node("MatMul", ["h", "a"], ["p"]), node("MatMul", ["h", "b"], ["q"])]
WEIGHTS = {"a": drawn(8, 6), "b": drawn(8, 5)}
MLP = [
    node("MatMul", ["x", "gate"], ["gated"]),
    node("Sigmoid", ["gated"], ["open"]),
    node("MatMul", ["x", "up"], ["u"]),
    node("Add", ["u", "up.bias"], ["upped"]),
    node("Mul", ["open", "upped"], ["h"]),
    node("MatMul", ["h", "down"], ["y"]),
]
GATED = {"gate": drawn(8, 6), "up": drawn(8, 6, seed=1), "up.bias": drawn(6), "down": drawn(6, 8)}


def carrier(made, x="h"):
    linears = find_linears(made.graph)
    readers = [linear for linear in linears if linear.x.name == x]
    assert readers
    return find_carrier(readers[0].x, readers, {linear.y: linear for linear in linears})


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_carries(norm):
    nodes, constants = NORMS[norm]
    found = carrier(model([*nodes, *TWO], X, ["p", "q"], constants | WEIGHTS))
    assert found is not None
    assert found.linear is None


def test_the_layer_before_a_product_carries():
    found = carrier(model(MLP, X, ["y"], GATED))
    assert found is not None
    assert found.linear.name == "up"


def without(nodes, *more, outputs=("y",), constants=None):
    return model([*nodes, *more], X, outputs, constants or GATED)


NONE = {
    "the activation is an output": without(MLP, outputs=("y", "h")),
    "something else reads the activation": without(MLP, node("Relu", ["h"], ["r"]), outputs=("y", "r")),
    "something else reads the layer before": without(MLP, node("Relu", ["upped"], ["r"]), outputs=("y", "r")),
    "the layer before is an output": without(MLP, outputs=("y", "upped")),
    "a function between": without([*MLP[:4], node("Tanh", ["upped"], ["h"]), MLP[-1]]),
    "a residual": without([*MLP[:4], node("Add", ["upped", "gated"], ["h"]), MLP[-1]]),
}


@pytest.mark.parametrize("case", NONE)
def test_nothing_carries(case):
    assert carrier(NONE[case]) is None


def test_a_norm_that_a_residual_reads_carries_nothing():
    nodes, constants = NORMS["rms norm"]
    made = model([*nodes, *TWO, node("Add", ["h", "x"], ["r"])], X, ["p", "q", "r"], constants | WEIGHTS)
    assert carrier(made) is None
    assert carrier(model(TWO, {"h": ["B", "S", 8]}, ["p", "q"], WEIGHTS)) is None  # an input of the graph


def test_two_linear_layers_of_one_product():
    """The columns of either layer can be divided, because no activation function follows the gate here."""
    nodes = [MLP[0], *MLP[2:4], node("Mul", ["gated", "upped"], ["h"]), MLP[-1]]
    found = carrier(without(nodes))
    assert found is not None
    assert found.linear.name in ("gate", "up")


FACTORS = {"h": np.exp(drawn(8, seed=5)), "mlp": np.exp(drawn(6, seed=6))}
FEEDS = {"x": drawn(2, 3, 8, seed=9)}


def same_after(make, plan, folder, dtype, tolerance):
    before, after = folder / "before", folder / "after"
    whole = GraphChoices({name: LayerChoice("float") for name in plan.layers})
    feeds = {"x": FEEDS["x"].astype(dtype)}
    exact = run(write(make(), whole, settings("float", dtype), before), feeds, optimized=False)
    moved = run(write(make(), plan, settings("float", dtype), after), feeds, optimized=False)
    for one, other in zip(exact, moved, strict=True):
        assert one.dtype == other.dtype == dtype
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * np.abs(one).max())


def typed(constants, dtype):
    return {
        name: array if array.dtype == np.int64 else array.astype(dtype) for name, array in constants.items()
    }


WIDTHS = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])


@pytest.mark.parametrize("norm", NORMS)
@WIDTHS
def test_factors_of_a_norm_change_nothing(norm, dtype, tolerance, tmp_path):
    nodes, constants = NORMS[norm]
    plan = GraphChoices(
        {"a": LayerChoice("float"), "b": LayerChoice("float")},
        rows=dict.fromkeys("ab", FACTORS["h"]),
        norms={"h": FACTORS["h"]},
    )

    def make():
        return model([*nodes, *TWO], X, ["p", "q"], typed(constants | WEIGHTS, dtype), dtype)

    same_after(make, plan, tmp_path, dtype, tolerance)


@WIDTHS
def test_factors_of_a_gated_mlp_change_nothing(dtype, tolerance, tmp_path):
    plan = GraphChoices(
        dict.fromkeys(("gate", "up", "down"), LayerChoice("float")),
        rows={"down": FACTORS["mlp"]},
        columns={"up": FACTORS["mlp"]},
    )
    same_after(lambda: model(MLP, X, ["y"], typed(GATED, dtype), dtype), plan, tmp_path, dtype, tolerance)


def test_a_shared_norm_weight_is_divided_for_one_norm_only(tmp_path):
    """Two norms share a weight: the other norm, and the layers that read it, stay as they were."""
    nodes = [
        node("RMSNormalization", ["x", "g"], ["h"], axis=-1),
        node("Relu", ["x"], ["z"]),
        node("RMSNormalization", ["z", "g"], ["other"], axis=-1),
        *TWO,
        node("Relu", ["other"], ["r"]),
    ]
    plan = GraphChoices(
        dict.fromkeys("ab", LayerChoice("float")),
        rows=dict.fromkeys("ab", FACTORS["h"]),
        norms={"h": FACTORS["h"]},
    )
    same_after(lambda: model(nodes, X, ["p", "q", "r"], GAIN | WEIGHTS), plan, tmp_path, "float32", 1e-5)


def test_a_shared_weight_is_multiplied_for_one_layer_only(tmp_path):
    nodes = [
        node("RMSNormalization", ["x", "g"], ["h"], axis=-1),
        node("MatMul", ["h", "a"], ["p"]),
        node("MatMul", ["x", "a"], ["q"]),
    ]
    plan = GraphChoices(
        {"a": LayerChoice("float"), "a#2": LayerChoice("float")},
        rows={"a": FACTORS["h"]},
        norms={"h": FACTORS["h"]},
    )
    same_after(lambda: model(nodes, X, ["p", "q"], GAIN | WEIGHTS), plan, tmp_path, "float32", 1e-5)
