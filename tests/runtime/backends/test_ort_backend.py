"""ONNX Runtime behind the seam."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from visprune.bundle import Bundle
from visprune.errors import BundleError, MissingExtraError, UnsupportedError
from visprune.runtime.backends import PROVIDERS, ort_cpu
from visprune.runtime.backends.runner import BackendOptions, to_numpy

OPTIONS = BackendOptions("cpu", 1)


@pytest.fixture
def embedding(tiny_bundle):
    with ort_cpu.open_cpu(Bundle.open(tiny_bundle), "embedding", OPTIONS) as runner:
        yield runner


def test_specs_are_the_manifests(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    for name, graph in bundle.manifest.graphs.items():
        with ort_cpu.open_cpu(bundle, name, OPTIONS) as runner:
            assert runner.specs.inputs == graph.inputs
            assert runner.specs.outputs == graph.outputs


def test_outputs_stay_with_the_backend_and_feed_back(embedding):
    import onnxruntime

    ids = np.array([[5, 6]], dtype=np.int64)
    out = embedding.infer({"input_ids": ids, "image_features": np.zeros((0, 8), np.float32)})
    value = out["inputs_embeds"]
    assert isinstance(value, onnxruntime.OrtValue)
    assert to_numpy(value).shape == (1, 2, 8)
    again = embedding.infer({"input_ids": np.array([[2, 2]]), "image_features": to_numpy(value)[0]})
    np.testing.assert_array_equal(to_numpy(again["inputs_embeds"]), to_numpy(value))


@pytest.mark.parametrize("ids", [np.array([[5, 10**6]]), np.array([5, 6]), np.array([[0.5]])])
def test_a_run_that_fails_names_the_graph(embedding, ids):
    with pytest.raises(BundleError, match="cannot run the graph 'embedding': ") as caught:
        embedding.infer({"input_ids": ids, "image_features": np.zeros((0, 8), np.float32)})
    assert "export the model again" in caught.value.hint
    assert "\n" not in caught.value.what


def test_strided_arrays_and_scalars(tiny_bundle, embedding):
    strided = np.arange(3, 23, dtype=np.int64).reshape(1, 20)[:, ::2]
    blank = np.zeros((0, 8), np.float32)
    got = embedding.infer({"input_ids": strided, "image_features": blank})["inputs_embeds"]
    want = embedding.infer({"input_ids": strided.copy(), "image_features": blank})["inputs_embeds"]
    np.testing.assert_array_equal(to_numpy(got), to_numpy(want))
    with ort_cpu.open_cpu(Bundle.open(tiny_bundle), "token_pruner", OPTIONS) as pruner:
        features = np.random.default_rng(0).random((2, 16, 3)).astype(np.float32)
        out = pruner.infer({"vision_features": features, "keep_tokens": np.array(3)})
        assert to_numpy(out["keep_indices"]).shape == (2, 3)


def test_a_graph_that_cannot_be_read(tiny_copy):
    (tiny_copy / "onnx" / "embedding.onnx").write_bytes(b"no graph")
    bundle = Bundle.open
    with pytest.raises(BundleError):
        bundle(tiny_copy)  # the size is noticed first
    size = (tiny_copy / "onnx" / "embedding.onnx").stat().st_size
    text = (tiny_copy / "visprune.json").read_text()
    import json

    data = json.loads(text)
    data["files"]["onnx/embedding.onnx"]["size"] = size
    (tiny_copy / "visprune.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cannot load the graph 'embedding'"):
        ort_cpu.open_cpu(bundle(tiny_copy), "embedding", OPTIONS)


@pytest.mark.parametrize(
    ("kind", "index", "changes", "what"),
    [
        ("inputs", 0, {"dtype": "foo"}, "input 'input_ids' is int64"),
        ("inputs", 0, {"name": "ids"}, "input 'ids' is in only one"),
        ("inputs", 1, {"shape": ("M", 9)}, "input 'image_features' is float32"),
        ("inputs", 1, {"shape": (8,)}, "input 'image_features'"),
        ("inputs", 1, {"shape": (0, 8)}, "input 'image_features'"),
        ("inputs", 1, None, "input 'image_features' is in only one"),
        ("outputs", 0, {"dtype": "float16"}, "output 'inputs_embeds'"),
        ("inputs", 1, {"shape": ("other", 8)}, None),
    ],
)
def test_a_graph_that_is_not_the_manifests(tiny_bundle, kind, index, changes, what):
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.manifest.graphs["embedding"]
    specs = list(getattr(graph, kind))
    specs[index : index + 1] = [] if changes is None else [replace(specs[index], **changes)]
    graphs = {"embedding": replace(graph, **{kind: tuple(specs)})}
    altered = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    if what is None:
        ort_cpu.open_cpu(altered, "embedding", OPTIONS)
        return
    with pytest.raises(BundleError, match=what) as caught:
        ort_cpu.open_cpu(altered, "embedding", OPTIONS)
    assert "graph 'embedding'" in caught.value.what


def test_a_version_that_computes_wrongly(tiny_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.0")
    with pytest.raises(UnsupportedError, match=r"1\.23\.0 is too old"):
        ort_cpu.open_cpu(Bundle.open(tiny_bundle), "embedding", OPTIONS)


def test_no_onnxruntime_at_all(tiny_bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        ort_cpu.open_cpu(Bundle.open(tiny_bundle), "embedding", OPTIONS)
    assert "visprune[cpu]" in caught.value.hint


@pytest.mark.parametrize(
    "said",
    [
        "BFCArena: Failed to allocate memory for requested buffer of size 123",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=h",
        "std::bad_alloc",
    ],
)
def test_running_out_of_memory_is_said(embedding, said):
    def fail(binding):
        raise RuntimeError(said)

    embedding._session = SimpleNamespace(io_binding=embedding._session.io_binding, run_with_iobinding=fail)
    with pytest.raises(UnsupportedError, match="not enough memory for the graph 'embedding'"):
        embedding.infer({"input_ids": np.array([[5]]), "image_features": np.zeros((0, 8), np.float32)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_activations_are_not_kept_after_a_run(tmp_path):
    helper = pytest.importorskip("onnx").helper
    made, count = helper.TensorProto.FLOAT, 50_000_000
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("shape", helper.TensorProto.INT64, [1])]
    outputs = [helper.make_tensor_value_info("sum", made, [])]
    graph = helper.make_graph(nodes, "large", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with ort_cpu.open_model(model.SerializeToString(), tmp_path, "large", OPTIONS) as runner:
        runner.infer({"shape": np.array([1])})
        before = _resident()
        runner.infer({"shape": np.array([count])})
        assert _resident() - before < count  # a quarter of the bytes of `large`


def _resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_every_provider_can_be_imported():
    for target in PROVIDERS.values():
        module, _, name = target.partition(":")
        assert importlib.util.find_spec(module) is not None
        assert callable(getattr(importlib.import_module(module), name))
