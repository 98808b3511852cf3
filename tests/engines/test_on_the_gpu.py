"""Engines that are built on the machine with the GPU, tested without a GPU.

The package `tensorrt` needs a GPU to build. A module of that name stands in for it: it has everything of
`tensorrt_rtx`, and a version of its own. So Polygraphy, the parser and the builder are real, but the engines
are those of TensorRT-RTX, and prove nothing for TensorRT on a Jetson. The reported GPU does not exist.
"""

from __future__ import annotations

import json
import os
import sys

import pytest

pytest.importorskip("tensorrt_rtx")

from visprune import cli
from visprune.bundle import Bundle
from visprune.engines import build, builder
from visprune.errors import MissingExtraError, UnsupportedError, UsageError
from visprune.machine import Gpu

ORIN = Gpu("Orin", 87)


@pytest.fixture(scope="module")
def jetpack6(tmp_path_factory):
    pytest.importorskip("torch")
    from visprune.export import export

    output = tmp_path_factory.mktemp("jetpack6") / "demo"
    return export(method="fopru-rank", ratio=0.5, target="jetpack6", verify=False, output=output)


@pytest.fixture
def gpu(monkeypatch):
    """Set the GPU that this machine reports: `gpu(found)`."""
    return lambda found: monkeypatch.setattr("visprune.machine.gpu", lambda: found)


@pytest.fixture
def tensorrt(tmp_path_factory, monkeypatch):
    """Install a TensorRT of a version for this process and its subprocesses: `tensorrt(version)`."""

    def install(version):
        folder = tmp_path_factory.mktemp("installed")
        module = f'from tensorrt_rtx import *\n\n__version__ = "{version}"\n'
        (folder / "tensorrt.py").write_text(module, encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    yield install
    sys.modules.pop("tensorrt", None)


def test_on_an_orin(jetpack6, tmp_path, monkeypatch, gpu, tensorrt, capsys):
    """Its graphs of opset 19 become engines, and the timing cache is kept."""
    gpu(ORIN)
    tensorrt("10.3.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    timings = tmp_path / "cache" / "visprune" / "engines" / "tensorrt-10.3.0-sm87.timings"
    timings.parent.mkdir(parents=True)
    timings.write_bytes(b"damaged")
    arguments = [str(jetpack6.path), "--target", "jetpack6", "-o", str(tmp_path / "new")]
    assert cli.run_command("build", arguments) == 0
    assert "built by tensorrt 10.3.0, not run" in capsys.readouterr().out
    engines = Bundle.open(tmp_path / "new").manifest.engines
    assert [engine.graph for engine in engines] == list(jetpack6.manifest.graphs)
    assert {(e.flavour, e.version, e.sm) for e in engines} == {("tensorrt", "10.3.0", 87)}
    assert engines[0].file == "engines/vision_encoder.sm87.engine"
    assert timings.read_bytes() != b"damaged"


def test_what_was_measured_may_be_out_of_reach(tmp_path):
    """The timing cache only saves time: without it the engine is built all the same."""
    (tmp_path / "timings").mkdir()
    assert builder._open_timings(str(tmp_path / "timings")) is None
    assert builder._open_timings(None) is None
    (tmp_path / "file").write_bytes(b"seconds")
    with builder._open_timings(str(tmp_path / "file")) as file:
        assert file.read() == b"seconds"


REFUSED = {
    "no GPU": (
        {},
        None,
        "10.3.0",
        UnsupportedError,
        "No NVIDIA GPU is found .* to the Jetson",
    ),
    "another GPU": (
        {},
        Gpu("RTX 4090", 89),
        "10.3.0",
        UnsupportedError,
        r"SM89 \(RTX 4090\), and jetpack6 is for 87. Export for tensorrt or rtx.",
    ),
    "a GPU of no target": ({}, Gpu("GTX 1080", 61), "10.3.0", UnsupportedError, "No target .* this GPU"),
    "no TensorRT": ({}, ORIN, None, MissingExtraError, "python3-libnvinfer.*--system-site-packages"),
    "too old": ({}, ORIN, "8.6.2", UnsupportedError, r"TensorRT 8.6.2, .* takes 10.3 and newer.*JetPack"),
    "too new": ({}, ORIN, "11.4.1", UnsupportedError, "takes 10.3 .* below 11. Export for jetpack7-orin"),
    "an SM": ({"sm": (87,)}, ORIN, "10.3.0", UsageError, "--sm is given"),
    "another target": (
        {"target": "jetpack7-orin"},
        ORIN,
        "10.16.1",
        UnsupportedError,
        "exported for jetpack6, .*visprune-export .* --keep-tokens 72 --target jetpack7-orin",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_built(case, jetpack6, tmp_path, monkeypatch, gpu, tensorrt):
    options, found, version, kind, match = REFUSED[case]
    gpu(found)
    if version is None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        tensorrt(version)
    monkeypatch.setattr("visprune.engines.build_job.build_in_subprocess", None)
    with pytest.raises(kind, match=match):
        build(jetpack6, tmp_path / "new", **{"target": "jetpack6"} | options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_neither_gpu_nor_tensorrt(jetpack6, gpu, monkeypatch, capsys):
    gpu(None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    arguments = [str(jetpack6.path), "--target", "jetpack6", "--dry-run", "--workspace", "0.5"]
    assert cli.run_command("build", [*arguments, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [problem["what"].split(",")[0] for problem in told["problems"]] == [
        "No NVIDIA GPU is found here",
        "The package 'tensorrt' is not installed.",
    ]
    assert set(told["profiles"]) == set(jetpack6.manifest.graphs)
    assert (told["sm"], told["gpu"], told["workspace_bytes"]) == ([], None, 500_000_000)
    assert cli.run_command("build", arguments) == 2
    said = capsys.readouterr().out
    assert "jetpack6: Jetson Orin with JetPack 6; GPU: none found" in said
    assert "GPU memory, not measured: 5.37 MB of weights" in said
    assert "at most 500 MB" in said
