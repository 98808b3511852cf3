"""The table of targets, and versions of TensorRT that it refuses.

Refused precisions are tested in tests/quantize/test_quantize_options.py, refusals before a build in
tests/engines.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from visprune.errors import MissingExtraError, UnsupportedError
from visprune.targets import (
    FP8_SM,
    TARGETS,
    Target,
    check_version,
    in_place,
    target,
    tensorrt,
)

ENGINES = [name for name, known in TARGETS.items() if known.engines]


@pytest.mark.parametrize("name", TARGETS)
def test_a_row_says_what_fits_together(name):
    known = TARGETS[name]
    assert bool(known.engines) == bool(known.sms) == bool(known.versions[0]) == known.builds_engines
    assert known.opset == {"native": 23, "primitive": 19}[known.flavour]
    assert "nvfp4" not in known.quantized
    if known.engines:
        assert known.dtype == "float16"  # TensorRT has kernels of `Attention` for no other
        assert "fp8" not in known.quantized or max(known.sms) >= FP8_SM
        check_version(name, known.versions[0])
        with pytest.raises(UnsupportedError):
            check_version(name, known.versions[1])


@pytest.mark.parametrize("name", ENGINES)
def test_native_graphs_are_for_what_reads_them(name):
    known = TARGETS[name]
    if known.engines == "tensorrt":
        least = tuple(map(int, known.versions[0].split(".")))
        assert (known.flavour == "native") == (least >= (10, 15))


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("jetpack6", "10.3.0"),
        ("jetpack6", "10.7.0.23"),
        ("jetpack7-orin", "10.16.1.11"),
        ("jetpack7.0-thor", "10.13.3.9"),
        ("jetpack7-thor", "11.4.1"),
        ("tensorrt", "10.15.1.29"),
        ("rtx", "1.7.1.116"),
    ],
)
def test_versions_that_a_target_takes(name, version):
    check_version(name, version)


@pytest.mark.parametrize(
    ("name", "version", "match"),
    [
        ("jetpack6", "8.6.2", "TensorRT 8.6.2, and the target jetpack6 takes 10.3 .* JetPack"),
        ("jetpack7-orin", "10.3.0", "takes 10.15 and newer, below 12. Export for jetpack6, which"),
        ("jetpack7-thor", "10.13.3", "Export for jetpack7.0-thor, which"),
        ("jetpack7.0-thor", "10.16.1", "Export for jetpack7-thor, which"),
        ("tensorrt", "10.3.0", r'pip install "tensorrt>=10.15,<12"'),
        ("rtx", "1.3.0", r'TensorRT-RTX 1.3.0.*pip install "tensorrt-rtx>=1.4,<2"'),
        ("onnxruntime", "1.31", "has no engines"),
    ],
)
def test_versions_that_it_does_not(name, version, match):
    with pytest.raises(UnsupportedError, match=match):
        check_version(name, version)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("tensorrt", "10.15.0", True),
        ("tensorrt", "10.9.0", False),
        ("jetpack7-thor", "11.4.1", True),
        ("jetpack7.0-thor", "10.13.3", False),
        ("jetpack6", "10.16.0", False),
        ("rtx", "1.7.1.116", True),
        ("rtx", "1.6.9", False),
        ("onnxruntime", "1.31.0", False),
    ],
)
def test_where_caches_are_written_in_place(name, version, expected):
    assert in_place(name, version) is expected


def test_a_tensorrt_that_is_missing(monkeypatch):
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ENGINES:
        with pytest.raises(MissingExtraError) as caught:
            tensorrt(name)
        assert ("--system-site-packages" in caught.value.hint) == name.startswith("jetpack")
        assert ("pip install" in caught.value.hint) != name.startswith("jetpack")


def test_a_tensorrt_of_another_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert tensorrt("jetpack6").__version__ == "10.3.0"
    with pytest.raises(UnsupportedError, match="Export for jetpack6"):
        tensorrt("jetpack7-orin")


def test_a_new_board_is_one_row(monkeypatch, tiny_bundle):
    row = Target("board", "A new one", "native", 23, "float16", ("int8",), "tensorrt", ("12.0", "13"), (130,))
    monkeypatch.setitem(TARGETS, "board", row)
    from visprune.bundle import Bundle
    from visprune.engines.build_options import BuildOptions
    from visprune.engines.checks import problems
    from visprune.machine import Gpu

    assert target("board") is row
    check_version("board", "12.3")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="12.1"))
    pytest.importorskip("polygraphy")
    manifest = replace(Bundle.open(tiny_bundle).manifest, target="board")
    assert not list(problems(manifest, BuildOptions("board"), Gpu("new", 130)))
    assert [str(p) for p in problems(manifest, BuildOptions("board"), Gpu("old", 87))] == [
        "This GPU is SM87 (old), and board is for 130. Export for jetpack6 or jetpack7-orin."
    ]
