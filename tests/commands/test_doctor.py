"""What the doctor says of this machine, and of machines that are not here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from machines import machine

from visprune import cli
from visprune.commands.features import Found, Package, features, look
from visprune.machine import Gpu
from visprune.runtime.backends import PROVIDERS
from visprune.targets import TARGETS

VERSIONS = {"tensorrt": "10.16.1", "tensorrt-rtx": "1.7.1"}
BUILD = ("polygraphy", "onnx-ir", "ml-dtypes")
EVERYTHING = ("CPUExecutionProvider", "CUDAExecutionProvider")


@pytest.fixture
def call(capfd):
    def run(*arguments):
        code = cli.run_command("doctor", list(arguments))
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def on(tmp_path):
    """What works on a machine: `on("rtx4090", "tensorrt", ...) -> {feature: note, "" if it works}`."""

    def ask(name, *packages, **changes):
        found = look(machine(name, tmp_path))
        known = {
            one: Package(one, VERSIONS.get(one, "1.0") if one in packages else None) for one in found.packages
        }
        found = replace(found, **({"packages": known, "providers": EVERYTHING, "trouble": ""} | changes))
        return notes(found)

    return ask


def notes(found: Found) -> dict[str, str]:
    made = features(found)
    assert all(bool(one.note) != one.works for one in made)
    return {one.name: one.note for one in made}


def test_tells_what_works(call):
    code, out, err = call()
    assert (code, err) == (0, "")
    for part in ("machine", "memory", "cache", "run on cpu", "run on tensorrt-rtx", "export", "quantize"):
        assert part in out


def test_a_cache_that_cannot_be_a_directory(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not writable" in call()[1]


def test_every_provider_and_target_is_judged(on):
    made = on("plain")
    assert {name.removeprefix("run on ") for name in made if name.startswith("run on")} >= set(PROVIDERS)
    engines = {name for name, one in TARGETS.items() if one.builds_engines}
    assert {name.removeprefix("build engines for ") for name in made if name.startswith("build")} == engines


def test_survives_missing_packages(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(KeyError(name)))
    code, out, _ = call("--json")
    assert code == 0
    data = json.loads(out)
    assert all(package["version"] is None for package in data["packages"])
    made = {feature["name"]: feature for feature in data["features"]}
    assert not any(feature["works"] for feature in made.values())
    assert 'pip install "visprune[cpu]"' in made["run on cpu"]["note"]
    assert 'pip install "visprune[export]"' in made["export"]["note"]


def test_no_gpu(on):
    made = on("plain", "tensorrt", "tensorrt-rtx", "cuda-bindings", *BUILD)
    for name in ("run on cuda", "run on tensorrt", "run on ort-tensorrt-rtx", "build engines for jetpack6"):
        assert made[name] == "no NVIDIA GPU with a driver found"
    assert made["build engines for rtx"] == ""  # needs none


def test_a_pc_with_a_gpu(on):
    bare = on("rtx4090")
    assert 'pip install "visprune[tensorrt]"' in bare["run on tensorrt"]
    assert 'pip install "visprune[tensorrt-rtx]"' in bare["build engines for rtx"]
    assert bare["run on cuda"] == ""
    packages = ("tensorrt", "tensorrt-rtx", "cuda-bindings", *BUILD, "onnxruntime-ep-nv-tensorrt-rtx")
    made = on("rtx4090", *packages)
    assert not any(note for name, note in made.items() if name.startswith("run on"))
    assert "this is SM89, not SM87" in made["build engines for jetpack6"]


def test_wheels_of_onnxruntime(on):
    assert "visprune[gpu]" in on("rtx4090", providers=EVERYTHING[:1])["run on cuda"]
    both = on("rtx4090", "onnxruntime", "onnxruntime-gpu")
    assert "clash" in both["run on cuda"]
    assert both["run on ort-tensorrt"].startswith(both["run on cuda"])


def test_a_gpu_that_tensorrt_rtx_does_not_know(on):
    made = on("rtx4090", "tensorrt-rtx", "cuda-bindings", *BUILD, gpu=Gpu("H100", 90))
    assert "this GPU is SM90" in made["run on tensorrt-rtx"]
    assert made["build engines for rtx"] == ""


def test_a_jetson_whose_tensorrt_is_hidden(on, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/me/env")
    made = on("orin-nano-jetpack6")
    hidden = made["run on tensorrt"]
    assert "10.3.0.30" in hidden
    assert "--system-site-packages" in hidden
    assert made["build engines for jetpack6"] == hidden
    assert "SM87" in made["run on tensorrt-rtx"]
    assert "--provider tensorrt" in on("orin-nano-jetpack6", providers=EVERYTHING[:1])["run on cuda"]
    seen = on("orin-nano-jetpack6", "tensorrt", "cuda-bindings", *BUILD, gpu=Gpu("Orin", 87))
    assert seen["run on tensorrt"] == seen["build engines for jetpack6"] == ""


def test_a_jetson_whose_driver_does_not_answer(on):
    made = on("orin-nano-jetpack6", "tensorrt", "cuda-bindings", *BUILD)
    for name in ("run on tensorrt", "run on cuda", "build engines for jetpack6"):
        assert "--runtime nvidia" in made[name]


def test_a_tensorrt_of_another_version(on, monkeypatch):
    packages = ("tensorrt", "cuda-bindings", *BUILD)
    assert on("rtx4090", *packages)["build engines for tensorrt"] == ""
    monkeypatch.setitem(VERSIONS, "tensorrt", "10.9.0")
    why = on("rtx4090", *packages)["build engines for tensorrt"]
    assert "This is TensorRT 10.9.0, and the target tensorrt takes 10.15" in why


def test_a_jetson_without_tensorrt(on):
    assert "apt-get install nvidia-jetpack" in on("thor-jetpack7")["run on tensorrt"]
