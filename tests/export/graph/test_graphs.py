"""What the exported files look like: operators, opsets, dtypes, names, and each weight once."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from tensorrt_10_3 import problems

import visprune
from visprune.errors import ParityError, UnsupportedError
from visprune.export import export

DYNAMIC_SHAPE = {"NonZero", "Compress", "Unique", "If", "Loop", "Scan"}
SINGLE = {"Attention", "RMSNormalization", "RotaryEmbedding"}


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """One export for each target, of a model with a CLS that is kept and a head size of its own."""
    path = checkpoint(checkpoint.Tiny(strategy="full", head_dim=12, tower_layers=4))
    folder = tmp_path_factory.mktemp("bundles")
    return {
        target: export(path, method="fopru-rank", ratio=0.5, target=target, output=folder / target)
        for target in ("onnxruntime", "jetpack6")
    }


def graphs(bundle):
    for name, graph in bundle.manifest.graphs.items():
        yield name, onnx.load(bundle.file(graph.file), load_external_data=False)


def operators(model):
    return {node.op_type for node in model.graph.node}


def test_flavours(bundles):
    for target, opset in (("onnxruntime", 23), ("jetpack6", 19)):
        found = set()
        for _, model in graphs(bundles[target]):
            assert model.ir_version == 10
            assert {o.domain: o.version for o in model.opset_import} == {"": opset}
            assert not operators(model) & DYNAMIC_SHAPE
            assert bool(list(problems(model))) == (target == "onnxruntime")
            found |= operators(model)
        assert found & SINGLE == (SINGLE if target == "onnxruntime" else set())


def test_a_decoder_for_onnx_runtime_leaves_heads_and_cache_to_the_operator(bundles):
    """Nothing is left to be laid out or appended around it."""
    decoder = dict(graphs(bundles["onnxruntime"]))["decoder_model_merged"]
    assert not operators(decoder) & {"Transpose", "Reshape", "Concat"}
    for node in decoder.graph.node:
        if node.op_type == "Attention":
            assert [name.partition(".")[0] for name in node.output[1:]] == ["present", "present"]
            assert [name.partition(".")[0] for name in node.input[4:]] == ["past_key_values"] * 2


@pytest.mark.parametrize("kind", ["llama", "Qwen3Config"])
def test_a_decoder_for_tensorrt_concatenates_outside(kind, checkpoint, tmp_path):
    """In float16, where cosine and sine are cast, too."""
    path = checkpoint(checkpoint.Tiny(text=kind))
    made = export(path, method="uniform", ratio=0.5, target="rtx", verify=False, output=tmp_path / "made")
    decoder = dict(graphs(made))["decoder_model_merged"]
    kinds = [node.op_type for node in decoder.graph.node]
    layers = kinds.count("Attention")
    assert layers > 0
    assert kinds.count("RotaryEmbedding") == kinds.count("Concat") == 2 * layers
    assert not {"Neg", "Softmax"} & set(kinds)
    assert all(len(node.output) == 1 for node in decoder.graph.node)


def test_only_the_scored_layer_is_spelled_out(bundles):
    model = dict(graphs(bundles["onnxruntime"]))["vision_encoder"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Softmax") == 1
    assert kinds.count("Attention") == 2  # three of four layers run; the third is scored


def test_layers_after_the_feature_are_not_exported(bundles):
    model = dict(graphs(bundles["onnxruntime"]))["vision_encoder"]
    names = {i.name for i in model.graph.initializer}
    assert any("layers.2." in name for name in names)
    assert not any("layers.3." in name or "post_layernorm" in name for name in names)


def test_weights_are_written_once_and_in_the_target_dtype(bundles):
    for target, width in (("onnxruntime", 4), ("jetpack6", 2)):
        bundle = bundles[target]
        unused = 4 * 32 * 32 + 2 * 32 * 48  # the last layer of the tower, and a little more
        for name, model in graphs(bundle):
            kinds = {i.data_type for i in model.graph.initializer if len(i.dims) == 2}
            wanted = onnx.TensorProto.FLOAT if width == 4 else onnx.TensorProto.FLOAT16
            assert kinds <= {wanted, onnx.TensorProto.INT64}, name
        data = sum(r.size for n, r in bundle.manifest.files.items() if n.endswith(".onnx_data"))
        assert data <= width * (bundle.manifest.source.parameters - unused)


def test_scores_are_float32_in_every_flavour(bundles):
    for bundle in bundles.values():
        specs = {s.name: s.dtype for s in bundle.manifest.graphs["vision_encoder"].outputs}
        assert specs["attention_received"] == "float32"
    assert {s.name: s.dtype for s in bundles["jetpack6"].manifest.graphs["vision_encoder"].outputs}[
        "image_features"
    ] == "float16"


def test_dimensions_have_the_names_of_the_glossary(bundles):
    specs = {
        (name, s.name): s.shape
        for name, graph in bundles["onnxruntime"].manifest.graphs.items()
        for s in (*graph.inputs, *graph.outputs)
    }
    assert specs["vision_encoder", "pixel_values"] == ("T", 3, 56, 56)
    assert specs["vision_encoder", "image_features"] == ("T", 17, 32)
    assert specs["token_pruner", "image_features"] == ("M", 32)
    assert specs["token_pruner", "keep_indices"] == ("T", "K")
    assert specs["token_pruner", "keep_tokens"] == ()
    assert specs["embedding", "input_ids"] == (1, "S")
    assert specs["decoder_model_merged", "past_key_values.1.key"] == (1, 2, "P", 12)
    assert specs["decoder_model_merged", "present.1.value"] == (1, 2, "P + S", 12)
    assert specs["decoder_model_merged", "logits"] == (1, 1, 320)


def test_graphs_pass_the_checker_and_hold_no_paths_of_this_machine(bundles):
    for bundle in bundles.values():
        for graph in bundle.manifest.graphs.values():
            path = bundle.file(graph.file)
            onnx.checker.check_model(str(path))
            assert b"site-packages" not in path.read_bytes()


def test_the_cls_of_a_full_strategy_is_kept_and_not_counted(bundles, pictures):
    with visprune.load(bundles["onnxruntime"].path) as pipeline:
        answer = pipeline.generate(pictures[0], "?", max_new_tokens=1)
    assert (answer.visual_tokens, answer.tokens_kept) == (16, 8)
    assert bundles["onnxruntime"].manifest.pruning.always_kept == 1
    kept = np.array(answer.keep_indices[0])
    assert kept.shape == (8,)
    assert kept.max() < 16


def test_another_ratio_at_run_time(bundles, pictures):
    with visprune.load(bundles["onnxruntime"].path) as pipeline:
        kept = [
            pipeline.generate(pictures[0], "?", max_new_tokens=1, keep_tokens=k).keep_indices[0]
            for k in (1, 4, 15, 16)
        ]
    for small, large in itertools.pairwise(kept):
        assert set(small) < set(large)


def test_parity_is_recorded(bundles):
    for bundle in bundles.values():
        parity = json.loads(bundle.manifest.to_json())["parity"]
        assert parity["verified"]
        names = [row["name"] for row in parity["rows"]]
        assert {"kept set", "prefill logits, nothing pruned", "greedy tokens"} <= set(names)
        assert all(row["passed"] and row["difference"] <= row["tolerance"] for row in parity["rows"])


def test_a_wrong_graph_fails_the_export(checkpoint, tmp_path, monkeypatch):
    """The self-check must be able to fail: one weight is written wrong."""
    from visprune.export.graph import write

    original = write._array

    def wrong(name, tensor, dtype):
        array = original(name, tensor, dtype)
        return array * 1.01 if "gate_proj" in name and "layers.1" in name else array

    monkeypatch.setattr(write, "_array", wrong)
    with pytest.raises(ParityError, match="prefill logits"):
        export(checkpoint(checkpoint.Tiny()), method="fopru-rank", ratio=0.5, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_beyond_float16_is_refused(checkpoint, tmp_path):
    import transformers

    path = checkpoint(checkpoint.Tiny(dtype="bfloat16"))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = 1e6
    copy = tmp_path / "model"
    transformers.AutoProcessor.from_pretrained(path, backend="pil").save_pretrained(copy)
    model.save_pretrained(copy)
    with pytest.raises(UnsupportedError, match="float16 ends at 65504"):
        export(copy, method="none", dtype="fp16", output=tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_unverified_export_says_so_and_has_a_name_by_itself(checkpoint, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(checkpoint(checkpoint.Tiny()), tmp_path / "my-llava")
    monkeypatch.chdir(tmp_path)
    bundle = export("my-llava", method="fopru-row", ratio=0.5, verify=False)
    assert bundle.path.name == "my-llava-fopru-row-keep8"
    assert not bundle.manifest.parity.verified
    assert bundle.manifest.parity.rows == ()
