"""Quantization together with pruning before and inside the LLM, and with images that are tiles."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from visprune.bundle import Bundle
from visprune.export import export
from visprune.quantize import quantize
from visprune.runtime import load

# Largest errors of outputs. The weights are random, so errors grow from layer to layer.
BOUND = {"int8": 0.1, "int8-dynamic": 0.1, "fp8": 0.15, "int4": 0.4}


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory):
    """A bundle with heads that share keys, images of several tiles, and pruning before and inside the LLM."""
    path = checkpoint(checkpoint.Tiny(family="llava_next", text="qwen2", layers=3, lively=True))
    output = tmp_path_factory.mktemp("float") / "bundle"
    return export(path, method="fopru-rank", then="fastv", ratio=0.5, output=output, verify=False)


@pytest.mark.parametrize("precision", BOUND)
def test_each_precision(precision, source, lines, tmp_path, report):
    made = quantize(
        source,
        tmp_path / "made",
        precision=precision,
        calibration=lines,
        timing=False,
        error_budget=float("inf"),
    )
    Bundle.open(made.path).verify()
    told = made.manifest.quantization
    said = report(made)
    head = "int8-weights" if precision in ("int8-dynamic", "int4") else precision
    assert {layer["precision"] for layer in said["layers"]} == {precision, head}
    changed = {layer["graph"] for layer in said["layers"]}
    assert changed >= {"vision_encoder", "token_pruner"}
    assert any(name.startswith("decoder") for name in changed)
    assert {error.graph for error in told.errors} == changed
    assert all(error.relative_l2 < BOUND[precision] for error in told.errors)
    assert all(layer["cosine"] > 0.9 for layer in said["layers"])
    with load(made.path) as quantized, load(source.path) as whole:
        before, after = (
            pipeline.generate(tmp_path / "wide0.png", "What is it?", max_new_tokens=4)
            for pipeline in (whole, quantized)
        )
    assert after.layer_tokens == before.layer_tokens
    assert after.token_ids


@pytest.mark.parametrize("method", ["dart", "visionzip", "resize"])
def test_methods_that_read_the_question_merge_or_resize(method, checkpoint, lines, tmp_path, report):
    path = checkpoint(checkpoint.Tiny(lively=True))
    source = export(path, method=method, ratio=0.3, output=tmp_path / "float", verify=False)
    made = quantize(source, tmp_path / "made", precision="int8", calibration=lines, timing=False)
    told = made.manifest.quantization
    assert {layer["graph"] for layer in report(made)["layers"]} >= {"vision_encoder", "token_pruner"}
    assert all(error.relative_l2 < BOUND["int8"] for error in told.errors)
    with load(made.path) as quantized, load(source.path) as whole:
        for ratio in (0.3, 1.0):
            before, after = (
                pipeline.generate(tmp_path / "wide0.png", "What is it?", ratio=ratio, max_new_tokens=4)
                for pipeline in (whole, quantized)
            )
            assert after.tokens_kept == before.tokens_kept
            shared = set(after.keep_indices[0]) & set(before.keep_indices[0])
            assert len(shared) >= before.tokens_kept // 2


def test_every_segment_has_its_layers(source, lines, tmp_path, report):
    made = quantize(source, tmp_path / "made", precision="int8-dynamic", calibration=lines, timing=True)
    said = report(made)
    per_graph = {}
    for layer in said["layers"]:
        per_graph.setdefault(layer["graph"], []).append(layer["layer"])
    decoder = [name for graph, names in per_graph.items() if graph.startswith("decoder") for name in names]
    assert len(decoder) == 3 * 7 + 1
    assert len(set(decoder)) == len(decoder)
    times = {graph["graph"]: graph for graph in said["graphs"]}
    assert all(np.isfinite(list(times[name]["prefill"].values())).all() for name in per_graph)
    assert all(times[name]["step"] for name in per_graph if name.startswith("decoder"))
    assert times["vision_encoder"]["step"] is None


def test_more_tokens_than_were_calibrated_with(source, lines, tmp_path):
    """A quantized bundle still takes another number of tokens at run time."""
    made = quantize(source, tmp_path / "made", precision="int8", calibration=lines, timing=False)
    with load(made.path) as pipeline:
        kept = [
            pipeline.generate(tmp_path / "wide0.png", "What?", max_new_tokens=2, keep_tokens=keep).tokens_kept
            for keep in (2, 8)
        ]
    assert kept[0] < kept[1]
