"""Errors in a bundle and in calibration data are refused, and nothing is written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import onnx

from visprune.bundle import Bundle
from visprune.errors import BundleError, InputError, UsageError
from visprune.manifest import MANIFEST, FileRecord
from visprune.quantize import quantize
from visprune.records import sha256
from visprune.runtime import load

PRUNER, DECODER = "onnx/token_pruner.onnx", "onnx/decoder_model_merged.onnx"


@pytest.fixture
def edited(tiny_copy):
    """Change a graph of the hand-made bundle by a function, and correct its hashes."""

    def edit(file, change):
        manifest = Bundle.open(tiny_copy).manifest
        model = onnx.load(tiny_copy / file)
        change(model.graph)
        onnx.save(model, tiny_copy / file)
        record = FileRecord((tiny_copy / file).stat().st_size, sha256(tiny_copy / file))
        text = replace(manifest, files=manifest.files | {file: record}).to_json()
        (tiny_copy / MANIFEST).write_text(text, encoding="utf-8")
        return Bundle.open(tiny_copy)

    return edit


def with_weight(name, change):
    """Return a function that changes an initializer of a graph."""

    def edit(graph):
        (tensor,) = (one for one in graph.initializer if one.name == name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return edit


def with_nan(name):
    return with_weight(name, lambda array: array.__setitem__((0, 0), np.nan))


@pytest.mark.parametrize("text", [[], ["", "  "]], ids=["empty", "blank lines"])
def test_a_calibration_file_without_lines(text, tiny, jsonl, refused):
    refused(UsageError, "is empty", tiny, calibration=jsonl(text))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("no json", "Line 2 .* is not JSON"),
        ("[1]", "Line 2 .* is not a JSON object"),
        ({"image": "0.png"}, "Line 2 .* has no 'prompt'"),
        ({"prompt": "what?"}, "Line 2 .* has no 'image'"),
        ({"image": "0.png", "prompt": " "}, "Line 2 .*: 'prompt' is not a text"),
        ({"image": 3, "prompt": "what?"}, "Line 2 .*: 'image' is not a text"),
        ({"image": "missing.png", "prompt": "what?"}, "Line 2 .*missing.png"),
        ({"image": "http://host/0.png", "prompt": "what?"}, "Line 2 .*http://host/0.png is a URL"),
        ({"image": "data:image/png;base64,?", "prompt": "what?"}, "Line 2 .*is not base64"),
    ],
)
def test_a_line_that_cannot_be_used(line, match, tiny, jsonl, refused):
    good = {"image": "0.png", "prompt": "what?"}
    refused(InputError, match, tiny, calibration=jsonl([good, line, good]))


def test_files_that_are_no_text(tiny, tmp_path, refused):
    refused(UsageError, "cannot be read", tiny, calibration=tmp_path / "none.jsonl")
    refused(UsageError, "cannot be read", tiny, calibration=tmp_path)
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\xff\xfe")
    refused(UsageError, "not text in UTF-8", tiny, calibration=tmp_path / "picture.jsonl")


@pytest.fixture
def damaged(tmp_path, jsonl):
    """A calibration file of ten lines, two of them with unreadable images."""
    lines = [{"image": f"{seed}.png", "prompt": f"what is {seed}?"} for seed in range(10)]
    path = jsonl(lines, pictures=10)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:100])
    (tmp_path / "7.png").write_text("no picture")
    return path


def test_unreadable_pictures_are_refused_by_name(damaged, tiny, refused):
    error = refused(InputError, "Line 4 of .*", tiny, calibration=damaged)
    assert "3.png" in str(error)
    error = refused(InputError, "2 of 10 pictures", tiny, calibration=damaged, max_skipped=0.1)
    assert "3.png" in str(error)
    assert "10%" in str(error)


def test_a_share_of_unreadable_pictures_is_left_out_and_named(damaged, tiny, tmp_path, report):
    made = quantize(
        tiny, tmp_path / "made", precision="int8", calibration=damaged, max_skipped=0.2, timing=False
    )
    said = report(made)
    assert said["samples"] + said["held_out"] == 8
    assert len(said["skipped"]) == 2
    assert "Line 4 " in said["skipped"][0]
    assert "7.png" in said["skipped"][1]


def test_all_pictures_unreadable(tiny, tmp_path, jsonl, refused):
    path = jsonl(pictures=2, lines=[{"image": f"{i}.png", "prompt": "what?"} for i in range(2)])
    for index in range(2):
        (tmp_path / f"{index}.png").write_text("no picture")
    refused(InputError, "Line 1 |cannot be read", tiny, calibration=path, max_skipped=0.99)


def test_too_few_samples(tiny, jsonl, refused):
    line = {"image": "0.png", "prompt": "what?"}
    refused(UsageError, "One sample is too few", tiny, calibration=jsonl([line]))
    refused(UsageError, "One sample is too few", tiny, calibration=jsonl(name="more.jsonl"), samples=1)
    refused(UsageError, "7 samples were asked for", tiny, calibration=jsonl(name="more.jsonl"), samples=7)


def test_no_calibration_data_for_a_model_that_has_none(tiny, tmp_path, refused):
    for precision in ("int8", "fp8"):
        refused(UsageError, "need calibration data", tiny, precision=precision)
        refused(UsageError, "need calibration data", tiny, precision="int4", vision=precision)
    for precision in ("int8-dynamic", "int4"):
        made = quantize(tiny, tmp_path / precision, precision=precision, timing=False)
        assert made.manifest.quantization.samples == 0
        assert made.manifest.quantization.errors == ()
        with load(made.path) as pipeline:
            assert pipeline.generate(None, "what?", max_new_tokens=3).token_ids


def test_prompts_that_do_not_fit(tiny, jsonl, refused):
    good = [{"image": "0.png", "prompt": "what?"}] * 3
    long = {"image": "1.png", "prompt": "word " * 200}
    error = refused(InputError, "256|context|long", tiny, calibration=jsonl([*good, long]))
    assert "Line 4 " in str(error)
    image = {"image": "1.png", "prompt": "what is <image> here?"}
    error = refused(InputError, "<image>", tiny, calibration=jsonl([image, *good]))
    assert "Line 1 " in str(error)


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_activations_that_are_not_finite(precision, edited, jsonl, refused):
    bundle = edited(PRUNER, with_nan("projector"))
    error = refused(BundleError, "not finite", bundle, precision=precision, calibration=jsonl())
    assert "decoder_model_merged" in str(error)
    assert "Line 1 " in str(error)


def test_activations_that_are_infinite(edited, jsonl, refused):
    change = with_weight("projector", lambda array: array.__setitem__((0, 0), 3e38))
    refused(BundleError, "not finite", edited(PRUNER, change), calibration=jsonl())


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp8", "int4"])
def test_weights_that_are_not_finite(precision, edited, jsonl, refused):
    """The weights are those of the last layer, whose output no linear layer reads."""
    bundle = edited(DECODER, with_nan("head"))
    refused(BundleError, "the largest is nan", bundle, precision=precision, calibration=jsonl())


@pytest.mark.parametrize("precision", ["int8-dynamic", "int4"])
def test_weights_that_are_not_finite_without_samples(precision, edited, refused):
    error = refused(BundleError, "not finite", edited(DECODER, with_nan("head")), precision=precision)
    assert "head" in str(error)


def test_a_token_table_that_is_not_finite(edited, refused):
    bundle = edited("onnx/embedding.onnx", with_nan("embedding"))
    refused(BundleError, "not finite", bundle, precision="int4", embedding="int8")


def silence(graph):
    """Change a graph so that the projector reads zeros."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "nothing"))
    place = next(i for i, one in enumerate(graph.node) if one.op_type == "MatMul")
    graph.node[place].input[0] = "silent"
    graph.node.insert(place, onnx.helper.make_node("Mul", ["kept", "nothing"], ["silent"]))


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_a_layer_that_only_sees_zeros_stays_float(precision, edited, tmp_path, jsonl, report):
    bundle = edited(PRUNER, silence)
    made = quantize(bundle, tmp_path / "made", precision=precision, calibration=jsonl(), timing=False)
    silent = [layer for layer in report(made)["layers"] if "zero in every sample" in layer["note"]]
    assert [layer["layer"] for layer in silent] == ["projector"]
    assert "projector" in made.manifest.quantization.kept_float
    with load(made.path) as pipeline:
        assert pipeline.generate(tmp_path / "0.png", "what?", max_new_tokens=3).token_ids


def test_a_bundle_that_is_quantized_already(tiny, tmp_path, jsonl, refused):
    lines = jsonl()
    made = quantize(tiny, tmp_path / "first", precision="int4", calibration=lines, timing=False)
    refused(UsageError, "quantized already .*decoder int4", made, calibration=lines)
    refused(UsageError, "quantized already", made.path, precision="int8-dynamic", calibration=lines)


def test_files_that_were_altered(tiny_copy, jsonl, refused):
    path = tiny_copy / DECODER
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    refused(BundleError, "altered", tiny_copy, calibration=jsonl())
    refused(BundleError, "altered", tiny_copy, precision="int4")
    path.write_bytes(data[:-1])
    refused(BundleError, "bytes instead of", tiny_copy, calibration=jsonl())
    refused(BundleError, "is not a bundle", tiny_copy / "onnx", calibration=jsonl())
