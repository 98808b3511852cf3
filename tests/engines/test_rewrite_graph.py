"""The rewritten form of a graph computes what the exported graph computes, on ONNX Runtime.

Both get the same inputs, step by step. Unused places of a buffer are filled with large numbers, so that a
node which reads them is noticed.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from checkpoints import checkpoint
from small_graphs import ir, model, node, onnx, session
from tracing import _collected, _quick_traces

from visprune.engines.rewrite_graph import prepare
from visprune.errors import EngineError
from visprune.export import export
from visprune.pruning.fitprune import FitPrune

__all__ = ["_collected", "_quick_traces", "checkpoint"]

CAPACITY = 24
STEPS = (7, 5, 1, 1, 2, 1)  # a prefill in two parts, then tokens
LIVELY = {"lively": True, "layers": 2}
CASES = {
    "merged-qwen3": (LIVELY | {"text": "Qwen3Config", "head_dim": 12}, {"method": "none"}),
    "fastv-qwen2": (
        LIVELY | {"layers": 3, "text": "qwen2", "kv_heads": 1, "tied": True},
        {"method": "fastv"},
    ),
    "pyramiddrop-llama": (LIVELY | {"kv_heads": 4}, {"method": "pyramiddrop"}),
    "fitprune-mistral": (
        LIVELY | {"text": "mistral", "head_dim": 12, "text_extra": (("sliding_window", 64),)},
        {"method": FitPrune((6, 0), 16, 0.7)},
    ),
    "sparsevlm-qwen2": (LIVELY | {"text": "qwen2", "kv_heads": 1}, {"method": "sparsevlm"}),
}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Export the bundle of a case in float32, once: `exported(case) -> Bundle`."""
    made = {}

    def get(case):
        if case not in made:
            tiny, options = CASES[case]
            output = tmp_path_factory.mktemp("exported") / case
            path = checkpoint(checkpoint.Tiny(**tiny))
            made[case] = export(path, output=output, target="rtx", dtype="fp32", verify=False, **options)
        return made[case]

    return get


def decoders(bundle):
    return {name: graph for name, graph in bundle.manifest.graphs.items() if name.startswith("decoder")}


def drawn(spec, rows, place):
    """Return random values of one input for `rows` new tokens, the first of which is token `place`."""
    rng = np.random.default_rng([place, len(spec.name)])
    if spec.name == "position_ids":
        return np.arange(place, place + rows)[None]
    if spec.dtype == "bool":  # both kinds, always
        return (np.arange(rows) % 2 == place % 2)[None]
    return rng.standard_normal((1, rows, spec.shape[2])).astype(spec.dtype)


def compare(bundle, name, tolerance=1e-5, garbage=1e4):
    """Run both forms of a decoder graph through all steps."""
    graph = bundle.manifest.graphs[name]
    path = bundle.file(graph.file)
    made = prepare(path, cache_capacity=CAPACITY)
    plain, in_place = session(path), session(made)
    names = [value.name for value in in_place.get_outputs()]
    past = [spec for spec in graph.inputs if "P" in spec.shape]
    held = {spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype) for spec in past}
    sizes = {spec.name: (1, spec.shape[1], CAPACITY, spec.shape[3]) for spec in past}
    rng = np.random.default_rng(0)
    buffers = {
        key: (garbage * rng.standard_normal(size)).astype(held[key].dtype) for key, size in sizes.items()
    }
    length = 0
    for rows in STEPS:
        new = {s.name: drawn(s, rows, length) for s in graph.inputs if s not in past}
        right = dict(zip((o.name for o in plain.get_outputs()), plain.run(None, new | held), strict=True))
        found = dict(
            zip(names, in_place.run(None, new | buffers | {"cache_length": np.array([length])}), strict=True)
        )
        length += rows
        for output, value in right.items():
            if output.startswith("present"):
                past_name = output.replace("present", "past_key_values")
                rest = buffers[past_name][:, :, length:]
                np.testing.assert_array_equal(found[output][:, :, length:], rest)
                np.testing.assert_allclose(found[output][:, :, :length], value, atol=tolerance)
                held[past_name], buffers[past_name] = value, found[output]
            else:
                np.testing.assert_allclose(found[output], value, atol=tolerance, rtol=1e-5, err_msg=output)
        if "logits" in right:
            assert found["greedy_token"].tolist() == [int(right["logits"][0, -1].argmax())]
    assert found.keys() - right.keys() == ({"greedy_token"} if "logits" in right else set())


@pytest.mark.parametrize("case", CASES)
def test_in_place_equals_concatenated(case, exported):
    bundle = exported(case)
    for name in decoders(bundle):
        compare(bundle, name)


def test_shapes_do_not_depend_on_what_is_held(exported):
    bundle = exported("fastv-qwen2")
    for graph in decoders(bundle).values():
        made = prepare(bundle.file(graph.file), cache_capacity=CAPACITY)
        loaded = onnx.load(made, load_external_data=False)
        onnx.checker.check_model(made)
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*loaded.graph.input, *loaded.graph.output, *loaded.graph.value_info)
        }
        caches = [shape for value, shape in shapes.items() if value.startswith(("past", "present"))]
        assert caches == [[1, 1, CAPACITY, 8]] * len(caches)
        assert shapes["cache_length"] == [1]
        assert not any("P" in str(dim) for shape in shapes.values() for dim in shape)
        assert [one.version for one in loaded.opset_import if one.domain == ""] == [24]


def test_weights_stay_where_they_are(exported):
    bundle = exported("fastv-qwen2")
    graph = bundle.manifest.graphs["decoder_segment_0"]
    path = bundle.file(graph.file)
    there = set(path.parent.iterdir())
    made = prepare(path, cache_capacity=CAPACITY)
    assert set(path.parent.iterdir()) - there <= {made}
    assert made.parent == path.parent
    tensors = onnx.load(made, load_external_data=False).graph.initializer
    kept = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
    assert kept == {bundle.file(graph.data).name}


def test_what_has_no_logits_and_no_cache_is_built_as_it_is(exported):
    bundle = exported("fastv-qwen2")
    path = bundle.file(bundle.manifest.graphs["segment_pruner"].file)
    assert prepare(path, cache_capacity=0) == path
    with pytest.raises(EngineError, match="segment_pruner has no cache") as caught:
        prepare(path, cache_capacity=CAPACITY)
    assert "Copy the bundle again" in caught.value.hint


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("opset", [19, 23])
@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([0.5, 3.0, -1.0, 3.0], 1),  # the first of equals
        ([-INF, -7.0, -INF, -8.0], 1),
        ([0.0, 0.0, 0.0, 0.0], 0),
        ([1.0, NAN, 2.0, 0.0], -1),
        ([1.0, 5.0, 2.0, NAN], -1),
        ([1.0, INF, 2.0, 0.0], -1),
        ([-INF] * 4, -1),
        ([NAN] * 4, -1),
    ],
)
def test_the_greedy_token(opset, logits, token, tmp_path):
    made = model([node("Identity", ["x"], ["logits"])], {"x": [1, 1, 4]}, {"logits": [1, 1, 4]}, {})
    made.opset_imports[""] = opset
    ir.save(made, tmp_path / "graph.onnx")
    path = prepare(tmp_path / "graph.onnx", cache_capacity=0)
    found = session(path).run(["greedy_token"], {"x": np.array([[logits]], np.float32)})[0]
    assert found.dtype == np.int64
    assert found.tolist() == [token]


READERS = {
    "another-mask": ("Attention", ["q", "present.0.key", "present.0.key", "mask"], [1, 2, "S", 8]),
    "no-mask": ("Attention", ["q", "present.0.key", "present.0.key"], [1, 2, "S", 8]),
    "a-sum": ("ReduceSum", ["present.0.key", "two"], [1, 2, 1, 8]),
    "a-length": ("Shape", ["present.0.key"], [4]),
    "old-keys": ("Identity", ["past_key_values.0.key"], [1, 2, "P", 8]),
}


@pytest.mark.parametrize("case", READERS)
def test_a_node_that_is_not_known_is_named(case, tmp_path):
    """A node that reads the cache in an unknown way is refused: it may not take unused columns for tokens."""
    operator, inputs, shape = READERS[case]
    cache, held = [1, 2, "P", 8], [1, 2, "P + S", 8]
    nodes = [
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node(operator, inputs, ["read"], name="reader"),
    ]
    given = {"new": [1, 2, "S", 8], "past_key_values.0.key": cache, "q": [1, 2, "S", 8]}
    given["mask"] = [1, 1, "S", "P + S"]
    made = model(nodes, given, {"present.0.key": held, "read": shape}, {"two": np.array([2])})
    ir.save(made, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=rf"of odd cannot .* node 'reader' \({operator}\)") as caught:
        prepare(tmp_path / "odd.onnx", cache_capacity=CAPACITY)
    assert "Export the model again" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]
