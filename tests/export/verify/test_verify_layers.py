"""The self-check layer by layer: it passes where the whole one does, and names the layer that is wrong."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from visprune.bundle import Bundle
from visprune.cli import run_command
from visprune.errors import ExportError, ParityError, UnsupportedError
from visprune.export import export
from visprune.export.checkpoint import resources
from visprune.export.verify import verify
from visprune.pruning.fitprune import FitPrune

MERGED = {
    "layers.0.self_attn.k_proj": "decoder_model_merged layer 0",
    "layers.3.self_attn.o_proj": "decoder_model_merged layer 3",
    "lm_head": "decoder_model_merged norm and head",
    "embed_tokens": "embedding inputs_embeds",
}
FITPRUNE = {"method": FitPrune((3, 4, 0, 0), 16, 0.7)}
FP32 = {"target": "jetpack6", "dtype": "fp32"}
# What differs in the checkpoint, how it is exported, the layers compared, and of some weights in which row
# it shows that they are wrong.
CASES = {
    "merged": ({}, {"method": "fopru-rank", "ratio": 0.5}, "0 1 2 3", MERGED),
    "merged-jetpack6": ({}, {"method": "none"} | FP32, "0 1 2 3", {"layers.3.self_attn.o_proj": "layer 3"}),
    "tied-head": (
        {"text": "qwen2", "tied": True},
        {"method": "none", "dtype": "fp16"},
        "0 1 2 3",
        {"lm_head": "norm and head", "layers.2.mlp.up_proj": "layer 2"},
    ),
    "segments": (
        {"text": "mistral", "kv_heads": 1},
        {"method": "none", "segments": 2},
        "0 1 2 3",
        {"layers.2.self_attn.o_proj": "decoder_segment_1 layer 2"},
    ),
    "fastv": (
        {},
        {"method": "fastv", "ratio": 0.5},
        "0 1:attention 1:MLP 2 3",
        {"layers.1.self_attn.q_proj": "decoder_segment_0 layer 1 attention"},
    ),
    "fastv-jetpack6": (
        {},
        {"method": "fastv", "ratio": 0.5} | FP32,
        "0 1:attention 1:MLP 2 3",
        {"layers.1.mlp.up_proj": "decoder_segment_1 layer 1 MLP"},
    ),
    "pyramiddrop": (
        {},
        {"method": "pyramiddrop", "ratio": 0.3},
        "0 1 2 3",
        {"scoring_layer.self_attn.q_proj": "decoder_segment_0 token_scores"},
    ),
    "fitprune": (
        {"text": "Qwen3Config", "head_dim": 16},
        FITPRUNE,
        "0:attention 0:MLP 1:attention 1:MLP 2 3",
        {"layers.1.self_attn.v_proj": "decoder_segment_1 layer 1 attention"},
    ),
    "sparsevlm": (  # the tokens that are compared layer by layer end in a picture, so that no text rates
        {"side": 6},
        {"method": "sparsevlm", "ratio": 0.3},
        "0:attention 0:MLP 1:attention 1:MLP 2 3",
        {"layers.1.self_attn.k_proj": "decoder_segment_1 layer 1 attention"},
    ),
}


@contextlib.contextmanager
def spoiled(bundle, weight):
    """A bundle in which all numbers of a weight are wrong, by 1% in float32; mended after that."""
    for graph in list(bundle.manifest.graphs.values())[1:]:  # the vision encoder has layers too
        for tensor in onnx.load(bundle.file(graph.file), load_external_data=False).graph.initializer:
            if weight in tensor.name and tensor.external_data:
                place = {entry.key: entry.value for entry in tensor.external_data}
                single = tensor.data_type == onnx.TensorProto.FLOAT
                values = np.memmap(
                    bundle.file(graph.data),
                    np.float32 if single else np.float16,
                    "r+",
                    int(place["offset"]),
                    tuple(tensor.dims),
                )
                before = values.copy()
                values *= values.dtype.type(1.01 if single else 1.5)
                values.flush()
                yield
                values[:] = before
                values.flush()
                return
    raise LookupError(weight)


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_it_judges_as_the_whole_check_does(case, checkpoint, tmp_path, monkeypatch):
    changes, options, layers, weights = CASES[case]
    original, found = verify.verify, []

    def both(bundle, source, features, methods, scope, report):
        assert scope == "layers"
        found.extend(original(bundle, source, features, methods, kind, report) for kind in ("whole", scope))
        for weight, row in weights.items():
            with spoiled(bundle, weight), pytest.raises(ParityError, match=f"{row} differs"):
                original(bundle, source, features, methods, scope, report)
        with spoiled(bundle, next(iter(weights))), pytest.raises(ParityError):
            original(bundle, source, features, methods, "whole", report)
        return found[1]

    monkeypatch.setattr(verify, "verify", both)
    path = checkpoint(checkpoint.Tiny(**{"layers": 4, "lively": True} | changes))
    bundle = export(path, output=tmp_path / "out", verify="layers", **options)
    bundle.verify()
    assert [parity.scope for parity in found] == ["whole", "layers"]
    assert bundle.manifest.parity == found[1]
    whole, rows = ([row.name for row in parity.rows] for parity in found)
    assert rows[:5] == whole[:5]
    compared = [name.split(" layer ")[1].replace(" ", ":") for name in rows if " layer " in name]
    assert compared == layers.split()
    assert rows[-1].endswith("norm and head")
    scores = [name for name in whole if "token_scores" in name]
    assert [name for name in rows if "token_scores" in name] == scores
    made = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert made == {*bundle.manifest.files, "visprune.json"}


def test_memory_decides(checkpoint, tmp_path, monkeypatch, capsys):
    path = checkpoint(checkpoint.Tiny())
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    bundle = export(path, method="none", output=tmp_path / "layers")
    assert bundle.manifest.parity.scope == "layers"
    with pytest.raises(ExportError, match="self-check needs about") as caught:
        export(path, method="none", output=tmp_path / "whole", verify="whole")
    assert "--verify layers" in caught.value.hint
    assert run_command("inspect", [str(bundle.path)]) == 0
    assert "the greedy check of the whole chain was skipped" in " ".join(capsys.readouterr().out.split())


def test_a_decoder_of_another_form(checkpoint, tmp_path, monkeypatch):
    path = checkpoint(checkpoint.Tiny(text="GemmaConfig", head_dim=16))
    with pytest.raises(UnsupportedError, match="'gemma' cannot be compared one by one"):
        export(path, method="none", output=tmp_path / "layers", verify="layers")
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    with pytest.raises(ExportError, match="self-check needs about") as caught:
        export(path, method="none", output=tmp_path / "whole")
    assert "--no-verify" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_the_command(checkpoint, tmp_path, capsys):
    model = str(checkpoint(checkpoint.Tiny()))
    common = [model, "--method", "none", "-o", str(tmp_path / "out")]
    assert run_command("export", [*common, "--verify", "layers", "--json", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["self_check"] == "layers"
    for options, words in (
        (["--verify", "half"], "no self-check 'half'"),
        (["--verify", "whole", "--no-verify"], "Both --verify and --no-verify"),
    ):
        assert run_command("export", [*common, "--force", *options]) == 2
        assert words in capsys.readouterr().err


def test_manifests_from_before_there_were_layers(tiny_copy):
    file = tiny_copy / "visprune.json"
    manifest = json.loads(file.read_text())
    assert manifest["parity"].pop("scope") == "whole"
    file.write_text(json.dumps(manifest))
    assert Bundle.open(tiny_copy).manifest.parity.scope == "whole"
