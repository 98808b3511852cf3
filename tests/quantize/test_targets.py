"""Bundles for JetPack 6, whose TensorRT reads opset 19."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import ir, onnx
from tensorrt_10_3 import problems

from visprune.errors import UnsupportedError
from visprune.export import export
from visprune.quantize import quantize
from visprune.runtime import load


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    """A tiny model for JetPack 6, unpruned: float16, norms as single operators, opset 19, tied embeddings."""
    output = tmp_path_factory.mktemp("jetpack6") / "float"
    path = checkpoint(checkpoint.Tiny(lively=True, tied=True, head_dim=16))
    return export(path, method="none", verify=False, output=output, target="jetpack6")


@pytest.fixture
def made(bundle, lines, tmp_path):
    """The same bundle in int8."""
    return quantize(bundle, tmp_path / "made", precision="int8", calibration=lines, timing=False)


def floats(bundle):
    """Return the float initializers with more than one number, by (graph, name)."""
    return {
        (name, value.name): value.const_value.numpy()
        for name, graph in bundle.manifest.graphs.items()
        for value in ir.load(bundle.file(graph.file)).graph.initializers.values()
        if value.const_value.dtype.is_floating_point() and value.const_value.size > 1
    }


def test_float16_stays_float16(bundle, made, tmp_path, report):
    assert {layer["precision"] for layer in report(made)["layers"]} == {"int8"}
    assert all(error.relative_l2 < 0.1 for error in made.manifest.quantization.errors)
    before, after = floats(bundle), floats(made)
    new = after.keys() - before.keys()
    assert len(new) > 20
    assert all(after[key].dtype == np.float16 for key in new)
    assert all(np.isfinite(after[key]).all() for key in new)
    assert all((after[key] != 0).all() for key in new if key[1].endswith(".scales"))
    # Norms exported as single operators carry factors too.
    assert {graph for graph, name in new if ".divided." in name} == {"vision_encoder", "decoder_model_merged"}
    with load(made.path) as pipeline:
        assert pipeline.generate(tmp_path / "wide0.png", "What?", max_new_tokens=4).token_ids


def test_what_int8_is_spelled_in(made):
    """Int8 graphs have opset 19 and only operators of TensorRT 10.3.

    Quantization is symmetric, with one scale for a tensor, and for a weight one for each output channel.
    """
    for name, graph in made.manifest.graphs.items():
        path = made.file(graph.file)
        onnx.checker.check_model(path)
        loaded = onnx.load(path)
        assert not list(problems(loaded))
        assert next(one.version for one in loaded.opset_import if one.domain == "") == 19
        assert {node.domain for node in loaded.graph.node} <= {""}, name
        constants = {one.name: onnx.numpy_helper.to_array(one) for one in loaded.graph.initializer}
        for node in loaded.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert not constants[node.input[2]].any()
                assert constants[node.input[2]].dtype == np.int8
                weight = constants.get(node.input[0])
                assert constants[node.input[1]].shape == (() if weight is None else weight.shape[1:])


def test_int4_is_what_tensorrt_documents(tmp_path_factory, tmp_path):
    """Opset 21 and blocks in a `DequantizeLinear` of [K, N] along K; TensorRT-RTX compiles it for SM86."""
    output = tmp_path_factory.mktemp("demo") / "float"
    whole = export(method="fopru-rank", ratio=0.5, target="jetpack6", verify=False, output=output)
    options = {"precision": "int8", "decoder": "int4", "block_size": 64, "samples": 4, "timing": False}
    made = quantize(whole, tmp_path / "made", **options)
    for name, graph in made.manifest.graphs.items():
        path = made.file(graph.file)
        onnx.checker.check_model(path)
        loaded = onnx.load(path)
        (opset,) = (one.version for one in loaded.opset_import if one.domain == "")
        kinds = {one.name: one for one in loaded.graph.initializer}
        four_bits = {name for name, one in kinds.items() if one.data_type == onnx.TensorProto.INT4}
        blocked = [
            node
            for node in loaded.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in four_bits
        ]
        assert opset == (21 if name == "decoder_model_merged" else 19)
        assert bool(blocked) == (name == "decoder_model_merged")
        for node in blocked:
            said = {one.name: one.i for one in node.attribute}
            assert said == {"axis": 0, "block_size": 64}
            rows, columns = kinds[node.input[0]].dims
            assert tuple(kinds[node.input[1]].dims) == (rows // 64, columns)
    assert all(error.relative_l2 < 0.15 for error in made.manifest.quantization.errors)
    pytest.importorskip("tensorrt_rtx")
    from rtx_engines import check

    check(made, ["decoder_model_merged"], sm=86)


@pytest.mark.parametrize("precision", ["fp8", "int8-weights", "int8-dynamic"])
def test_there_is_no_other_precision(precision, bundle, lines, tmp_path):
    there = set(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=f"jetpack6 cannot take {precision}"):
        quantize(bundle, tmp_path / "made", precision=precision, calibration=lines)
    assert set(tmp_path.iterdir()) == there
