"""A dry run: what it foretells is what an export writes, and it reads no weight and writes nothing."""

from __future__ import annotations

import json
import math
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import visprune
from visprune.cli import run_command
from visprune.errors import CheckpointError, UsageError
from visprune.export.checkpoint import resources
from visprune.runtime.vision.kept_tokens import keep_for


def floats(bundle, name):
    """Bytes of the weights that a graph holds, in its file and beside it."""
    import onnx

    model = onnx.load(bundle.file(bundle.manifest.graphs[name].file), load_external_data=False)
    sizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}
    return sum(math.prod(t.dims) * sizes.get(t.data_type, 0) for t in model.graph.initializer)


CASES = {
    "demo": ({}, {"method": "fopru-row", "ratio": 0.25}),
    "siglip, tied": ({"tower": "siglip", "tied": True, "strategy": "full"}, {"method": "none"}),
    "cut": ({"text": "qwen2", "layers": 4}, {"method": "random", "keep_tokens": 3, "segments": 3}),
    "in both places": (
        {"layers": 3, "hidden": 64},
        {"method": "fopru-rank", "ratio": 0.5, "then": "pyramiddrop:0.5", "target": "jetpack6"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sizes_and_counts_are_those_of_the_export(case, checkpoint, tmp_path):
    tiny, options = CASES[case]
    model = checkpoint(checkpoint.Tiny(**tiny)) if tiny else None
    found = visprune.preview(model, output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())

    bundle = visprune.export(model, output=tmp_path / "out", verify=False, **options)
    manifest = bundle.manifest
    assert {g.name: g.file for g in found.graphs} == {n: g.file for n, g in manifest.graphs.items()}
    for graph in found.graphs:
        # What the tracer computes from weights beforehand, such as positions, may differ by some numbers.
        assert graph.bytes == pytest.approx(floats(bundle, graph.name), rel=0.01, abs=256)
    assert found.kept == keep_for(manifest).describe(manifest)
    named = (manifest.target, manifest.flavour, manifest.opset, manifest.dtype)
    assert (found.target, found.flavour, found.opset, found.dtype) == named
    assert found.output == str(bundle.path)
    texts = ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json")
    beside = sum(manifest.files[name].size for name in texts)
    assert found.bytes == sum(graph.bytes for graph in found.graphs) + beside
    if model is None:
        written = sum(record.size for record in manifest.files.values())
        assert found.bytes == pytest.approx(written, rel=0.02)


@pytest.fixture
def huge(checkpoint, tmp_path):
    """LLaVA 1.5 with 7 B parameters, whose weights are a hole in the disk."""
    path = shutil.copytree(checkpoint(checkpoint.Tiny()), tmp_path / "huge")
    config = transformers.LlavaConfig(image_token_id=259)
    config.save_pretrained(path)
    processor = json.loads((path / "processor_config.json").read_text())
    processor["image_processor"] |= {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    (path / "processor_config.json").write_text(json.dumps(processor))
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration._from_config(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_large_model_is_foretold_from_its_headers(huge, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resources, "available_memory", lambda: 20 * 10**9)
    arguments = [str(huge), "--method", "fopru-rank", "--ratio", "0.25", "-o", str(tmp_path / "out")]
    arguments += ["--dtype", "fp16", "--dry-run"]
    assert run_command("export", [*arguments, "--verify", "whole", "--json"]) == 2
    printed = capsys.readouterr()
    assert "self-check needs about 28." in printed.err
    found = json.loads(printed.out)
    parameters = {graph["name"]: graph["parameters"] for graph in found["graphs"]}
    # Of the published sizes: the tower lacks its last layer, the decoder its embedding.
    width, inner = 1024, 4096
    layer = 4 * width * (width + 1) + 2 * width * inner + width + inner + 4 * width
    tower = 23 * layer + 577 * width + 3 * 14 * 14 * width + width + 2 * width
    assert parameters == {
        "vision_encoder": tower,
        "token_pruner": (1024 + 1 + 4096 + 1) * 4096,
        "embedding": 32000 * 4096,
        "decoder_model_merged": 6_738_415_616 - 32000 * 4096,
    }
    assert found["kept"] == "kept 144 of 576 visual tokens, 75% removed"
    assert found["memory"]["run"] > 4 * 7 * 10**9 > found["bytes"] > 2 * 7 * 10**9
    assert found["memory"]["export"] < 2 * 10**9
    assert found["obstacle"][1].endswith("--verify layers.")
    # Layer by layer it fits, which is what is done unasked; and without the check.
    assert run_command("export", [*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["self_check"], found["obstacle"]) == ("layers", None)
    assert 2 * 10**9 < found["self_check_bytes"] < 4 * 10**9
    assert run_command("export", [*arguments, "--no-verify"]) == 0
    assert not (tmp_path / "out").exists()


def test_the_command_tells_people(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(checkpoint(checkpoint.Tiny()))
    assert run_command("export", [model, "--method", "fopru-row", "--ratio", "0.25", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "onnx/vision_encoder.onnx",
        "kept 4 of 16 visual tokens, 75% removed",
        "native flavour, opset 23, float32",
        "for the self-check",
        "to run, on a CPU",
        "-fopru-row-keep4; this was a dry run, and nothing was written",
    ):
        assert words in printed
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_not_fitted(checkpoint, tmp_path, capsys):
    model = checkpoint(checkpoint.Tiny(layers=4))
    arguments = [str(model), "--method", "fitprune", "--ratio", "0.5", "--dry-run"]
    assert run_command("export", [*arguments, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "counts  not known yet" in printed
    assert "The recipe is fitted when the weights are read" in printed
    assert "decoder_segment_{k}" in printed
    assert "to fit the recipe" in printed
    assert "for the self-check" in printed

    found = visprune.preview(model, method="fitprune", ratio=0.5)
    whole = visprune.preview(model, method="none")
    assert found.kept is None
    assert [graph.bytes for graph in found.graphs] == [graph.bytes for graph in whole.graphs]
    with pytest.raises(UsageError, match="nowhere"):
        visprune.preview(model, method="fitprune", ratio=0.5, calibration=tmp_path / "nowhere.jsonl")


def test_a_fitted_recipe_is_foretold_without_reading_the_weights(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint(checkpoint.Tiny(layers=3)), tmp_path / "model")
    recipe = tmp_path / "recipe.json"
    visprune.fit(model, ratio=0.5, output=recipe, samples=2)
    bundle = visprune.export(model, method="fitprune", recipe=recipe, output=tmp_path / "out", verify=False)
    weights = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    (model / "model.safetensors").write_bytes(weights[:header] + bytes(len(weights) - header))

    found = visprune.preview(model, method="fitprune", recipe=recipe)
    assert found.kept == keep_for(bundle.manifest).describe(bundle.manifest)
    assert [graph.name for graph in found.graphs] == list(bundle.manifest.graphs)
    assert "when they are read" in found.notes[0]
    with pytest.raises(UsageError, match="other weights"):
        visprune.export(model, method="fitprune", recipe=recipe, output=tmp_path / "other")


def test_what_an_export_refuses_a_dry_run_refuses(checkpoint, tmp_path):
    model = checkpoint(checkpoint.Tiny())
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        visprune.preview(model, method="none", output=tmp_path / "out")
    with pytest.raises(UsageError, match="whole rows"):
        visprune.preview(model, method="fopru-row", keep_tokens=6)
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        visprune.preview(broken, method="none")
