"""Quantization of a float bundle, end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import ir, onnx

from visprune import demo as demo_model
from visprune.bundle import Bundle
from visprune.manifest import MANIFEST, SCHEMA_VERSION, Quantization
from visprune.quantize import quantize
from visprune.quantize.linears import find_linears
from visprune.runtime import load

# Largest errors of a graph's output on the demo model.
BOUNDS = {"int8": 0.08, "int8-dynamic": 0.03, "int8-weights": 0.02, "fp8": 0.08, "int4": 0.12}
WITHOUT_SAMPLES = ("int8-dynamic", "int8-weights")
MIXES = {
    "int4 decoder": {"precision": "int8", "decoder": "int4"},
    "float vision, int8 tokens": {"precision": "int8-dynamic", "vision": "float", "embedding": "int8"},
    "fp32 vision and projector": {"precision": "int4", "vision": "fp32", "projector": "fp32"},
    "int8 head": {"precision": "int4", "head": "int8-dynamic", "block_size": 32},
    "fp8 decoder": {"precision": "int8-dynamic", "decoder": "fp8", "head": "float"},
    "without smoothing": {"precision": "int8", "smooth": False, "ranges": "percentile"},
    "only tokens": {"precision": "int8", "vision": "float", "projector": "float", "decoder": "float"}
    | {"embedding": "int8"},
}


def layers_of(bundle, name):
    return find_linears(ir.load(bundle.file(bundle.manifest.graphs[name].file)).graph)


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def check_files(before, after):
    """Check that a bundle opens, with right hashes and files of its own.

    Returns:
        The number of files that equal those of the float bundle.
    """
    Bundle.open(after.path).verify()
    before.verify()
    assert files(after.path).keys() == {*after.manifest.files, MANIFEST}
    assert before.manifest.graphs.keys() == after.manifest.graphs.keys()
    for path in files(after.path).values():
        assert path.stat().st_nlink == 1  # onnx reads no weights from a file with two hard links
    for bundle in (before, after):
        for graph in bundle.manifest.graphs.values():
            onnx.load(bundle.file(graph.file))
    return sum(record == after.manifest.files.get(name) for name, record in before.manifest.files.items())


def size(bundle):
    graphs = bundle.manifest.graphs.values()
    return sum(
        bundle.file(file).stat().st_size for graph in graphs for file in (graph.file, graph.data) if file
    )


def check_report(before, after, report):
    """Check that the report has each linear layer of the changed graphs once, and fits the manifest."""
    said, told = report(after), after.manifest.quantization
    assert [graph["graph"] for graph in said["graphs"]] == list(before.manifest.graphs)
    named = [(layer["graph"], layer["layer"]) for layer in said["layers"]]
    changed = dict.fromkeys(graph for graph, _ in named)
    assert named == [(name, linear.name) for name in changed for linear in layers_of(before, name)]
    for name in before.manifest.graphs.keys() - changed.keys() - {"embedding"}:
        assert (
            after.manifest.files[after.manifest.graphs[name].file]
            == (before.manifest.files[before.manifest.graphs[name].file])
        )
    assert told.parts == said["parts"]
    assert told.samples == said["samples"]
    assert set(told.kept_float) == {layer["layer"] for layer in said["layers"] if layer["note"]}
    assert {error.graph: error.relative_l2 for error in told.errors} == {
        graph["graph"]: graph["relative_l2"] for graph in said["graphs"] if graph["relative_l2"] is not None
    }
    assert said["verdict"]
    return said


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_demo_model_in_each_precision(precision, demo, demo_in, report):
    made = demo_in(precision)
    assert check_files(demo, made) == 5
    said = check_report(demo, made, report)
    head = "int8-weights" if precision in ("int8-dynamic", "int4") else precision
    assert said["parts"]["head"] == head
    assert {layer["precision"] for layer in said["layers"] if layer["layer"] != "lm_head"} == {precision}
    assert [layer["precision"] for layer in said["layers"] if layer["layer"] == "lm_head"] == [head]
    assert len(said["layers"]) == 48
    errors = [layer["own_error"] for layer in said["layers"]]
    assert all(error is None if precision in WITHOUT_SAMPLES else 0 < error < 0.2 for error in errors)
    assert all(layer["cosine"] > 0.97 for layer in said["layers"])
    assert len(made.manifest.quantization.errors) == 3
    assert all(error.relative_l2 < BOUNDS[precision] for error in made.manifest.quantization.errors)
    assert not made.manifest.parity.verified
    share = 0.4 if precision == "int8-weights" else 0.35  # its blocks of 128 are padded: layers are 192 wide
    assert sum(graph["bytes"][1] for graph in said["graphs"]) < share * size(demo)
    # int4 uses samples if there are any, the others without ranges do not.
    assert (said["samples"], said["held_out"]) == (0 if precision in WITHOUT_SAMPLES else 6, 2)
    assert said["answers"]["samples"] == 2
    questions = json.loads(demo_model.QUESTIONS.read_text())[:4]
    with load(made.path) as pipeline:
        answers = [pipeline.generate(demo_model.IMAGE, one["question"]).text.strip() for one in questions]
    right = sum(answer == one["answer"] for answer, one in zip(answers, questions, strict=True))
    assert right >= 3


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix, tiny, tmp_path, jsonl, report):
    options = {"error_budget": float("inf"), "timing": False} | MIXES[mix]
    made = quantize(tiny, tmp_path / "made", calibration=jsonl(), **options)
    check_files(tiny, made)
    said = check_report(tiny, made, report)
    parts = said["parts"]
    for layer in said["layers"]:
        # The hand-made model has a projector and a decoder; no layer of it is called lm_head.
        part = "projector" if layer["graph"] == "token_pruner" else "decoder"
        assert layer["precision"] == parts[part]
    with load(made.path) as pipeline:
        assert pipeline.generate(tmp_path / "0.png", "what?", max_new_tokens=4).token_ids


def test_the_token_table_as_int8(tiny, tmp_path):
    from visprune.runtime.backends.ort_cpu import open_cpu
    from visprune.runtime.backends.runner import BackendOptions, to_numpy

    options = {"vision": "float", "projector": "float", "decoder": "float", "embedding": "int8"}
    made = quantize(tiny, tmp_path / "made", precision="int8", timing=False, **options)
    feeds = {"input_ids": np.arange(259)[None], "image_features": np.zeros((1, 8), np.float32)}
    exact, rounded = (
        _run(open_cpu(bundle, "embedding", BackendOptions("cpu", 1)), feeds, to_numpy)
        for bundle in (tiny, made)
    )
    scales = np.abs(exact).max(axis=-1, keepdims=True) / 127
    assert (np.abs(rounded - exact) <= scales * 0.5001).all()
    assert np.abs(rounded - exact).max() > 0


def _run(runner, feeds, to_numpy):
    with runner:
        return to_numpy(runner.infer(feeds)["inputs_embeds"])[0]


def test_calibration_is_remembered_and_the_same(tiny, tmp_path, jsonl):
    """A second run uses no sample and writes the same bytes. With other samples calibration runs again."""
    said = []

    def make(name, calibration):
        steps = []
        quantize(
            tiny,
            tmp_path / name,
            precision="int8",
            calibration=calibration,
            timing=False,
            progress=lambda what, *_: steps.append(what),
        )
        said.append("calibrating (remembered)" in steps)
        return {key: path.read_bytes() for key, path in files(tmp_path / name).items()}

    lines = jsonl()
    assert make("one", lines) == make("two", lines)
    other = [{"image": f"{seed}.png", "prompt": "another question"} for seed in range(6)]
    assert make("three", jsonl(other, "other.jsonl")) != make("one more", lines)
    assert said == [False, True, False, True]


def test_another_number_of_tokens_is_calibrated_anew(tiny_copy, edit_manifest, tmp_path, jsonl):
    lines, steps = jsonl(), []
    for keep in (4, 8):
        edit_manifest(tiny_copy, "pruning", keep_tokens=keep)
        quantize(
            tiny_copy,
            tmp_path / str(keep),
            precision="int8",
            calibration=lines,
            timing=False,
            progress=lambda what, *_: steps.append(what),
        )
    assert "calibrating (remembered)" not in steps


def test_a_damaged_memory_is_made_again(tiny, tmp_path, jsonl):
    from visprune.caches import cache_dir
    from visprune.quantize.calibration import _read

    options = {"precision": "int8", "calibration": jsonl(), "timing": False}
    quantize(tiny, tmp_path / "one", **options)
    (memory,) = (cache_dir() / "calibration").iterdir()
    good = memory.read_bytes()
    memory.write_bytes(good[:100])
    quantize(tiny, tmp_path / "two", **options)
    assert (tmp_path / "one" / "quantization.json").read_bytes() == (
        tmp_path / "two" / "quantization.json"
    ).read_bytes()
    assert _read(memory)
    with memory.open("wb") as file:
        np.save(file, np.zeros(3))  # no archive
    assert _read(memory) is None
    np.savez(memory)
    assert _read(memory) is None


STEPS = ("calibrating", "choosing ranges and factors", "running the float bundle", "quantizing")


@pytest.mark.parametrize("step", [*STEPS, "comparing answers"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_is_stopped_leaves_nothing(step, error, tiny, tmp_path, jsonl):
    lines = jsonl()
    there = set(tmp_path.iterdir())

    def progress(what, *_):
        if what == step:
            raise error

    with pytest.raises(error):
        quantize(tiny, tmp_path / "far" / "made", precision="int8", calibration=lines, progress=progress)
    assert set(tmp_path.iterdir()) == there


def test_an_older_manifest_knows_no_quantization(tiny_copy, edit_manifest):
    edit_manifest(tiny_copy, None, schema_version=3)
    data = json.loads((tiny_copy / MANIFEST).read_text())
    del data["quantization"]
    (tiny_copy / MANIFEST).write_text(json.dumps(data))
    assert Bundle.open(tiny_copy).manifest.quantization is None


def test_the_manifest_of_a_quantized_bundle_reads_back(tiny, tmp_path, jsonl):
    made = quantize(tiny, tmp_path / "made", precision="fp8", calibration=jsonl(), timing=False)
    told = made.manifest.quantization
    assert isinstance(told, Quantization)
    assert made.manifest.schema_version == SCHEMA_VERSION
    assert replace(made.manifest, files={}) == replace(Bundle.open(made.path).manifest, files={})
    assert told.parts == dict.fromkeys(("vision", "projector", "decoder", "head"), "fp8") | {
        "embedding": "float"
    }


def test_force_replaces_a_bundle(tiny, tmp_path, jsonl):
    options = {"calibration": jsonl(), "timing": False}
    quantize(tiny, tmp_path / "made", precision="int8", **options)
    made = quantize(tiny, tmp_path / "made", precision="int4", force=True, **options)
    assert made.manifest.quantization.parts["decoder"] == "int4"


@pytest.mark.parametrize("samples", [2, 3])
def test_hardly_any_samples(samples, tiny, tmp_path, jsonl, report):
    made = quantize(
        tiny, tmp_path / "made", precision="int8", calibration=jsonl(), samples=samples, timing=False
    )
    said = report(made)
    assert said["held_out"] >= 1
    assert said["samples"] + said["held_out"] == samples


def test_the_same_line_again_and_again(tiny, tmp_path, jsonl, report):
    """Errors are measured on an image even if its features are cached from an earlier sample."""
    lines = jsonl([{"image": "0.png", "prompt": "what?"}] * 8)
    made = quantize(tiny, tmp_path / "made", precision="int8", calibration=lines)
    assert len(made.manifest.quantization.errors) == 2
    assert report(made)["graphs"][0]["prefill"] is not None


def test_times_and_progress(tiny, tmp_path, jsonl, report):
    steps = []
    made = quantize(
        tiny,
        tmp_path / "made",
        precision="int4",
        calibration=jsonl(),
        progress=lambda *step: steps.append(step),
    )
    graphs = {graph["graph"]: graph for graph in report(made)["graphs"]}
    assert all(min(one["prefill"].values()) >= 0 for one in graphs.values())
    assert [name for name, one in graphs.items() if one["step"]] == ["embedding", "decoder_model_merged"]
    assert all(0 <= done <= total for _, done, total in steps)
    for what in {step[0] for step in steps}:
        counts = [done for said, done, _ in steps if said == what]
        assert counts == sorted(counts), what


def test_what_a_killed_command_left_is_cleared(tiny, tmp_path):
    (tmp_path / ".visprune-partial-0123abcd").mkdir()
    made = quantize(tiny, tmp_path / "made", precision="int8-dynamic", timing=False)
    assert list(tmp_path.iterdir()) == [made.path]
