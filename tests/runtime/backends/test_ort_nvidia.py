"""ONNX Runtime's providers for GPUs, as far as that goes without one: what is asked of it, and refusals."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from visprune.bundle import Bundle
from visprune.errors import InputError, MissingExtraError, UnsupportedError, VispruneError
from visprune.runtime import load
from visprune.runtime.backends import backend, ort, ort_cpu
from visprune.runtime.backends.ort_nvidia import RTX, TENSORRT, BoundedRunner
from visprune.runtime.backends.profiles import Limits, profiles
from visprune.runtime.backends.runner import BackendOptions, to_numpy

CHAINS = {
    "cuda": [ort.CUDA, ort.CPU],
    "ort-tensorrt": [TENSORRT, ort.CUDA, ort.CPU],
    "ort-tensorrt-rtx": [RTX, ort.CPU],
}


@pytest.fixture
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture
def asked(monkeypatch):
    """What ONNX Runtime is asked for, where it says that it has all: `asked(provider, bundle, graph)`.

    It has none of them, so it starts the last, the CPU; that has to be refused.
    """
    told = []
    real = onnxruntime.InferenceSession

    def session(path, settings, providers, enable_fallback):
        assert enable_fallback == 0
        told.append(providers)
        return real(path, settings, providers=providers[-1:])

    every = list(dict.fromkeys(name for chain in CHAINS.values() for name in chain))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))

    def ask(provider, bundle, graph="decoder_model_merged"):
        with pytest.raises(UnsupportedError, match="it would have used CPU") as caught:
            backend(provider)(bundle, graph, BackendOptions(provider, 1))
        assert "visprune doctor" in caught.value.hint
        return told.pop()

    return ask


@pytest.mark.parametrize("provider", CHAINS)
def test_the_order_of_providers(provider, asked, bundle):
    assert [name for name, _ in asked(provider, bundle)] == CHAINS[provider]


@pytest.mark.parametrize(("provider", "prefix"), [("ort-tensorrt", "trt"), ("ort-tensorrt-rtx", "nv")])
def test_the_profile_is_that_of_prefill(provider, prefix, asked, bundle):
    """Which has room for decoding."""
    for graph, (first, *others) in profiles(bundle.manifest, Limits()).items():
        own = asked(provider, bundle, graph)[0][1]
        for option, field in (("min", "least"), ("opt", "usual"), ("max", "most")):
            parsed = [one.rpartition(":") for one in own[f"{prefix}_profile_{option}_shapes"].split(",")]
            assert {name: tuple(map(int, dims.split("x"))) for name, _, dims in parsed} == {
                name: getattr(one, field) for name, one in first.inputs.items()
            }
        for name, one in first.inputs.items():
            for inside in (other.inputs[name] for other in others):
                assert all(a <= b for a, b in zip(one.least, inside.least, strict=True))
                assert all(a >= b for a, b in zip(one.most, inside.most, strict=True))


def test_each_model_and_version_has_its_own_folder(asked, bundle, monkeypatch):
    def folder(bundle, graph="embedding"):
        own = asked("ort-tensorrt", bundle, graph)[0][1]
        assert own["trt_engine_cache_path"] == own["trt_timing_cache_path"]
        assert Path(own["trt_engine_cache_path"]).is_dir()
        return own["trt_engine_cache_path"]

    first = folder(bundle)
    assert first == folder(bundle)
    files = dict(bundle.manifest.files)
    files["onnx/embedding.onnx"] = replace(files["onnx/embedding.onnx"], sha256="0" * 64)
    other = replace(bundle, manifest=replace(bundle.manifest, files=files))
    found = [first, folder(bundle, "decoder_model_merged"), folder(other)]
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.4.0"))
    assert len({*found, folder(bundle)}) == 4


@pytest.mark.parametrize("provider", ["ort-tensorrt", "ort-tensorrt-rtx"])
def test_without_a_place_nothing_is_kept(provider, asked, bundle, tmp_path, monkeypatch):
    (tmp_path / "visprune").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not [name for name in asked(provider, bundle)[0][1] if "cache" in name]


@pytest.mark.parametrize(("dtype", "flag"), [("float32", "False"), ("float16", "True")])
def test_float16_is_asked_for_where_the_bundle_has_it(dtype, flag, asked, bundle):
    own = asked("ort-tensorrt", replace(bundle, manifest=replace(bundle.manifest, dtype=dtype)))[0][1]
    assert (own["trt_fp16_enable"], own["trt_int8_enable"]) == (flag, "False")


@pytest.mark.skipif(ort.CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize(
    ("provider", "install"),
    [
        ("cuda", 'pip install "visprune[gpu]"'),
        ("ort-tensorrt", 'pip install "visprune[gpu]"'),
        ("ort-tensorrt-rtx", "pip install onnxruntime-ep-nv-tensorrt-rtx"),
    ],
)
def test_a_missing_package_is_said(provider, install, bundle):
    with pytest.raises(MissingExtraError) as caught:
        backend(provider)(bundle, "embedding", BackendOptions(provider, 1))
    assert install in caught.value.hint


def test_tensorrt_itself_is_missing(asked, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="'tensorrt' is not installed"):
        backend("ort-tensorrt")(bundle, "embedding", BackendOptions("ort-tensorrt", 1))


def test_libraries_that_are_missing_are_not_the_bundles_fault(asked, bundle, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("Please install TensorRT libraries as mentioned in the GPU requirements page")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(UnsupportedError, match="could not start TensorRT: it finds no libraries"):
        backend("ort-tensorrt")(bundle, "embedding", BackendOptions("ort-tensorrt", 1))


def test_the_plug_in_without_a_gpu(bundle, monkeypatch):
    """A plug-in whose library cannot be loaded, as where there is no driver."""
    plugin = SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "/no/such/library.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    with pytest.raises(UnsupportedError, match="could not start TensorRT-RTX") as caught:
        backend("ort-tensorrt-rtx")(bundle, "embedding", BackendOptions("ort-tensorrt-rtx", 1))
    assert "\n" not in caught.value.what


def test_inputs_beyond_the_profile_are_refused(bundle):
    """On the CPU, which would take them."""
    ranges = profiles(bundle.manifest, Limits(max_prompt=40, max_cache=60))["embedding"][0].inputs
    with BoundedRunner(
        ort_cpu.open_cpu(bundle, "embedding", BackendOptions("cpu", 1)), "embedding", ranges
    ) as runner:
        blank = np.zeros((0, 8), np.float32)
        out = runner.infer({"input_ids": np.full((1, 40), 5), "image_features": blank})
        assert to_numpy(out["inputs_embeds"]).shape == (1, 40, 8)
        with pytest.raises(InputError, match=r"'input_ids' of embedding is \[1, 41\].* at most \[1, 40\]"):
            runner.infer({"input_ids": np.full((1, 41), 5), "image_features": blank})


def test_option_names_are_those_of_the_library(asked, bundle):
    spec = importlib.util.find_spec("onnxruntime")
    library = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not library.exists():
        pytest.skip("this ONNX Runtime has no TensorRT")
    content = library.read_bytes()
    names = asked("ort-tensorrt", bundle)[0][1]
    assert not [name for name in names if f"{name}\0".encode() not in content]


@pytest.mark.gpu
@pytest.mark.parametrize("provider", CHAINS)
def test_a_gpu_answers_as_the_cpu_does(provider, tiny_bundle, picture):
    said = []
    for name in ("cpu", provider):
        try:
            pipeline = load(tiny_bundle, provider=name)
        except VispruneError as error:
            pytest.skip(error.what)
        with pipeline:
            chat = pipeline.chat()
            turns = chat.generate("ab", [picture(1)], max_new_tokens=8), chat.generate("cd", max_new_tokens=8)
            said.append([turn.token_ids for turn in turns])
    assert said[0] == said[1]
    assert len(set(said[0][0])) > 1
