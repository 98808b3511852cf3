"""What `--target jetpack6` writes has only what TensorRT 10.3 is known to take; see `tensorrt_10_3`.

Of each method those graphs are traced that are its own. Other methods, and what all share, are looked at
where they are exported for this target: in test_graphs, test_vision_methods, test_segments, and quantized in
tests/quantize/test_targets.
"""

from __future__ import annotations

import re

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from tensorrt_10_3 import problems

from visprune.background import BackgroundThread
from visprune.export.exporter import ExportOptions, prepare
from visprune.export.graph import graph_specs
from visprune.pruning.freepruner import FreePruner
from visprune.pruning.registry import BUILTIN

BEFORE = (
    "cdpruner",
    "dart",
    "divprune",
    "downsample",
    "fastervlm",
    "fopru-row",
    "freepruner",
    "holov",
    "prumerge+",
    "random",
    "resize",
    "uniform",
    "visionzip",
)
ELSEWHERE = {"fopru-rank", "vispruner", "fitprune", "none"}
NEXT = {"family": "llava_next", "text": "mistral"}
NEXT_VIDEO = {"family": "llava_next_video"}
ONEVISION = {"family": "llava_onevision", "tower": "siglip", "strategy": "full", "feature_layer": -1}


@pytest.fixture
def found(checkpoint, tmp_path, monkeypatch):
    """Problems of graphs whose names begin so: `found({...}, "token_pruner", method=...)`."""

    def find(tiny, *wanted, **options):
        path = checkpoint(checkpoint.Tiny(**tiny))
        settings = ExportOptions(target="jetpack6", verify=False, **options)
        job, _ = prepare(path, tmp_path / "never", settings)
        whole = graph_specs.graph_specs
        monkeypatch.setattr(
            graph_specs, "graph_specs", lambda *a: [one for one in whole(*a) if one.name.startswith(wanted)]
        )
        (tmp_path / "onnx").mkdir()
        with BackgroundThread() as background:
            graphs = job._write_graphs(tmp_path, background)
        assert len(graphs) >= len(wanted)
        return [
            f"{name}: {problem}"
            for name, graph in graphs.items()
            for problem in problems(onnx.load(tmp_path / graph.file, load_external_data=False))
        ]

    return find


@pytest.mark.parametrize("method", [*BEFORE, FreePruner(combine="votes")], ids=str)
def test_methods_before_the_llm(method, found):
    # The vision encoder differs where the image is made smaller, or all layers put out attention.
    graphs = ("vision_encoder",) * (method in ("resize", "freepruner"))
    assert not found({}, "token_pruner", *graphs, method=method)


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        ("fastv", ("segment_pruner", "decoder_segment_0")),
        ("pyramiddrop", ("segment_pruner",)),  # scores as fastv does
        ("sparsevlm", ("embedding", "segment_pruner", "decoder_segment_0")),
    ],
)
def test_methods_inside_the_llm(method, graphs, found):
    assert not found({"layers": 3}, *graphs, method=method)


def test_no_method_is_forgotten():
    assert {*BEFORE, "fastv", "pyramiddrop", "sparsevlm"} | ELSEWHERE == set(BUILTIN)


@pytest.mark.parametrize(
    ("tiny", "method"), [(NEXT, "fopru-row"), (NEXT_VIDEO, "uniform"), (ONEVISION, "uniform")]
)
def test_pictures_of_tiles(tiny, method, found):
    assert not found(tiny, "token_pruner", method=method)


@pytest.mark.parametrize(
    ("node", "kind", "what"),
    [
        (("NonZero", ["x"]), "FLOAT", "not in the list"),
        (("CumSum", ["x", "axis"]), "INT64", "CumSum .* of INT64"),
        (("CumSum", ["x", "where"]), "FLOAT", "input 1 is no constant"),
        (("Equal", ["x", "x"]), "BOOL", "Equal .* of BOOL"),
        (("Add", ["x", "x"]), "DOUBLE", "Add .* of DOUBLE"),
        (("Attention", ["x", "x", "x"]), "FLOAT16", "not in the list"),
    ],
)
def test_the_list_refuses(node, kind, what):
    operator, inputs = node
    types = {"x": getattr(onnx.TensorProto, kind), "where": onnx.TensorProto.INT64}
    given = [onnx.helper.make_tensor_value_info(name, kind, [2, 3]) for name, kind in types.items()]
    axis = onnx.helper.make_tensor("axis", onnx.TensorProto.INT64, [], [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, inputs, ["y"], name="n")], "g", given, [], [axis]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    (said,) = problems(model)
    assert re.search(what, said)
    model.opset_import[0].version = 23
    assert next(problems(model)) == "operators of ONNX 23"
