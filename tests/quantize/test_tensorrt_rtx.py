"""Every graph of the quantized demo model becomes a TensorRT-RTX engine, without a GPU."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from rtx_engines import check
from small_graphs import onnx, operators

from visprune.errors import UnsupportedError
from visprune.export import export
from visprune.quantize import quantize
from visprune.targets import check_sm

SMS = {"int8": (86, 89, 120), "fp8": (89, 120), "int4": (86,)}


@pytest.fixture(scope="module")
def rtx(tmp_path_factory):
    """The demo model for RTX GPUs, in fp16."""
    output = tmp_path_factory.mktemp("rtx") / "float"
    return export(method="fopru-rank", ratio=0.5, target="rtx", verify=False, output=output)


@pytest.fixture(scope="module")
def made(rtx, tmp_path_factory):
    """Quantize that bundle, once for each precision: `made(precision) -> Bundle`."""
    bundles = {}

    def make(precision):
        if precision not in bundles:
            output = tmp_path_factory.mktemp("made") / precision
            options = {"block_size": 64, "timing": False, "samples": 4}  # the demo model is 192 wide
            bundles[precision] = quantize(rtx, output, precision=precision, **options)
        return bundles[precision]

    return make


@pytest.mark.parametrize(("precision", "sm"), [(name, sm) for name, sms in SMS.items() for sm in sms])
def test_every_graph_builds(precision, sm, made):
    bundle = made(precision)
    check_sm(tuple(bundle.manifest.quantization.parts.values()), sm)
    check(bundle, bundle.manifest.graphs, sm=sm)


def test_fp8_is_refused_before_it_is_built_for_sm86(made):
    parts = made("fp8").manifest.quantization.parts
    with pytest.raises(UnsupportedError, match="SM86 has no fp8"):
        check_sm(tuple(parts.values()), 86)


def test_int4_blocks_are_whole(rtx, tmp_path):
    """TensorRT reads no shorter last block, so a layer that would need one stays float, and is named."""
    bundle = quantize(rtx, tmp_path / "made", precision="int4", block_size=64, timing=False, samples=4)
    left = {layer["layer"]: layer["note"] for layer in report_of(bundle) if layer["precision"] == "float"}
    assert left["tower.encoder.layers.0.self_attn.q_proj"].startswith("its 160 inputs are no whole blocks")
    assert "language_model.layers.0.self_attn.q_proj" not in left  # 192 inputs
    assert set(bundle.manifest.quantization.kept_float) == set(left)
    check(bundle, bundle.manifest.graphs)


def report_of(bundle):
    return json.loads(bundle.file(bundle.manifest.quantization.report).read_text())["layers"]


@pytest.mark.parametrize("precision", SMS)
def test_graphs_are_in_standard_operators(precision, made, rtx):
    """Layers that read the same activation share its QuantizeLinear, and all operators are standard ones."""
    bundle = made(precision)
    for name, graph in bundle.manifest.graphs.items():
        path = bundle.file(graph.file)
        onnx.checker.check_model(path)
        loaded = onnx.load(path, load_external_data=False)
        assert {node.domain for node in loaded.graph.node} <= {""}, name
        before, after = operators(rtx.file(graph.file)), operators(path)
        products = ("MatMul", "Gemm")
        assert sum(before.get(op, 0) for op in products) == sum(after.get(op, 0) for op in products)
        if precision != "int4":
            read = [node.input[0] for node in loaded.graph.node if node.op_type == "QuantizeLinear"]
            assert len(read) == len(set(read)), name


def test_the_numbers_are_sound(made):
    """In float16 on the CPU, errors are as small as those of the float32 bundle."""
    bounds = {"int8": 0.1, "fp8": 0.1, "int4": 0.15}
    for precision, bound in bounds.items():
        errors = made(precision).manifest.quantization.errors
        assert len(errors) == 3
        assert all(error.relative_l2 < bound for error in errors), precision
