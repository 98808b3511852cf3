"""Options that are not offered, or that a target does not support; and the command."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnx_ir")

from visprune.bundle import Bundle
from visprune.cli import run_command
from visprune.errors import UnsupportedError, UsageError
from visprune.quantize import QuantizeOptions, quantize
from visprune.quantize.quantize_options import resolve
from visprune.targets import TARGETS, check_sm, target


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "int5"}, "no precision 'int5'"),
        ({"precision": "float"}, "no precision 'float'"),
        ({"precision": "int8", "vision": "int5"}, "no vision 'int5'"),
        ({"precision": "int8", "head": "bf16"}, "no head 'bf16'"),
        ({"precision": "int8", "embedding": "int4"}, "no embedding 'int4'"),
        ({"precision": "int8", "ranges": "mean"}, "no ranges 'mean'"),
        ({"precision": "int4", "block_size": 48}, "block size 48"),
        ({"precision": "int8", "max_skipped": 1.0}, "share 1 is outside"),
        ({"precision": "int8", "max_skipped": float("nan")}, "share nan is outside"),
        ({"precision": "int8", "error_budget": 0.0}, "budget 0 is not positive"),
        ({"precision": "int8", "error_budget": float("nan")}, "budget nan is not positive"),
    ],
)
def test_options_that_mean_nothing(options, match, tiny, jsonl, refused):
    refused(UsageError, match, tiny, calibration=jsonl(), **options)


def test_parts_that_cannot_stay_as_asked(tiny, jsonl, refused):
    refused(UsageError, "vision cannot stay fp16: this bundle is fp32", tiny, vision="fp16")
    parts = dict.fromkeys(("vision", "projector", "decoder"), "float")
    refused(UsageError, "Every part is to stay float", tiny, calibration=jsonl(), **parts)


def test_an_output_that_is_there(tiny, tmp_path, jsonl, refused):
    lines = jsonl()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    refused(UsageError, "made", tiny, calibration=lines)
    refused(UsageError, "made", tiny, calibration=lines, force=True)
    assert (tmp_path / "made" / "mine.txt").read_text() == "mine"
    with pytest.raises(UsageError):
        quantize(tiny, tiny.path, precision="int8", calibration=lines)


@pytest.mark.parametrize(
    ("name", "precision", "match"),
    [
        ("jetpack6", "fp8", "jetpack6 cannot take fp8 .*SM89"),
        ("jetpack6", "int8-dynamic", "jetpack6 cannot take int8-dynamic .*beforehand"),
        ("jetpack6", "int8-weights", "jetpack6 cannot take int8-weights .*ONNX Runtime's own"),
        ("rtx", "int8-dynamic", "rtx cannot take int8-dynamic"),
    ],
)
def test_precisions_that_a_target_has_not(name, precision, match, tiny_copy, edit_manifest, jsonl, refused):
    edit_manifest(tiny_copy, None, target=name)
    refused(UnsupportedError, match, tiny_copy, precision=precision, calibration=jsonl())
    refused(UnsupportedError, match, tiny_copy, decoder=precision, calibration=jsonl())


def test_what_else_targets_have_not():
    with pytest.raises(UnsupportedError, match="token table cannot be int8"):
        resolve(QuantizeOptions("int8", embedding="int8"), TARGETS["rtx"], "float16")
    with pytest.raises(UnsupportedError, match="int8-dynamic computes in float32"):
        resolve(QuantizeOptions("int8-dynamic"), target("onnxruntime"), "float16")
    for name, platform in TARGETS.items():
        for precision in platform.quantized:
            dtype = "float32" if precision == "int8-dynamic" else platform.dtype
            assert resolve(QuantizeOptions(precision), platform, dtype).parts["vision"] == precision, name


@pytest.mark.parametrize(
    ("options", "name", "head"),
    [
        ({"precision": "int4"}, "onnxruntime", "int8-weights"),
        ({"precision": "int8-dynamic"}, "onnxruntime", "int8-weights"),
        ({"precision": "int8", "decoder": "int4"}, "onnxruntime", "int8-weights"),
        ({"precision": "int8"}, "onnxruntime", "int8"),
        ({"precision": "int4", "decoder": "float"}, "onnxruntime", "float"),
        ({"precision": "int4", "head": "int4"}, "onnxruntime", "int4"),
        ({"precision": "int4"}, "rtx", "int4"),
    ],
)
def test_the_head_that_goes_with_a_decoder(options, name, head):
    platform = TARGETS[name]
    assert resolve(QuantizeOptions(**options), platform, platform.dtype).parts["head"] == head


def test_tensorrt_has_no_small_blocks():
    for name, platform in TARGETS.items():
        options = QuantizeOptions("int4", block_size=32)
        if not platform.builds_engines:
            assert resolve(options, platform, platform.dtype).block_size == 32
            continue
        with pytest.raises(UnsupportedError, match=rf"no int4 in blocks of 32 \(target {name}\)"):
            resolve(options, platform, platform.dtype)
        mixed = QuantizeOptions("int8", block_size=32)  # no part has blocks
        assert resolve(mixed, platform, platform.dtype).parts["decoder"] == "int8"


def test_fp8_begins_with_sm89():
    for sm in (75, 80, 86, 87):
        with pytest.raises(UnsupportedError, match=f"SM{sm} has no fp8"):
            check_sm(("int8", "fp8"), sm)
        check_sm(("int8", "int4"), sm)
    for sm in (89, 110, 120):
        check_sm(("fp8",), sm)


COMMANDS = {
    "unknown precision": ["--precision", "int5"],
    "no calibration": ["--precision", "int8"],
    "empty calibration": ["--precision", "int8", "--calibration", "{empty}"],
    "unreadable picture": ["--precision", "int8", "--calibration", "{missing}"],
    "fp16 of an fp32 bundle": ["--precision", "int4", "--vision", "fp16"],
    "no precision": [],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_says_two_lines_and_writes_nothing(case, tiny_bundle, tmp_path, jsonl, capsys):
    places = {
        "empty": jsonl([], "empty.jsonl"),
        "missing": jsonl([{"image": "none.png", "prompt": "what?"}], "missing.jsonl"),
    }
    there = set(tmp_path.iterdir())
    arguments = [argument.format(**places) for argument in COMMANDS[case]]
    assert run_command("quantize", [str(tiny_bundle), *arguments, "-o", str(tmp_path / "made")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 2
    assert set(tmp_path.iterdir()) == there


def test_an_option_that_does_not_exist(tiny, tmp_path):
    with pytest.raises(TypeError, match="blocksize"):
        quantize(tiny, tmp_path / "made", precision="int8", blocksize=32)


def test_the_command_prints_the_verdict_first(tiny_bundle, tmp_path, jsonl, report, capsys):
    made = tmp_path / "made"
    arguments = ["--precision", "int8", "--calibration", str(jsonl()), "--no-timing", "-o", str(made)]
    assert run_command("quantize", [str(tiny_bundle), *arguments, "--error-budget", "1e-12"]) == 0
    said, told = capsys.readouterr().out.splitlines(), report(Bundle.open(made))
    count = len(told["layers"])
    assert said[0] == told["verdict"]
    assert said[1] == f"kept float: {count} of {count} layers, listed below"
    assert said[2].startswith(f"wrote {made} (")
    assert said[4].split()[:3] == ["graph", "precision", "error"]


def test_the_command_works_on_the_same_bundle(tiny_bundle, tmp_path, jsonl, capsys):
    arguments = ["--precision", "int8", "--calibration", str(jsonl()), "--no-timing", "--json"]
    assert run_command("quantize", [str(tiny_bundle), *arguments, "-o", str(tmp_path / "made")]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["decoder"] == "int8"
