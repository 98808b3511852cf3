"""ONNX Runtime on NVIDIA GPUs: with its own CUDA kernels, with TensorRT, or with TensorRT-RTX.

TensorRT and TensorRT-RTX build engines for parts of a graph when it is loaded, and keep them in visprune's
cache. Parts that they do not support run on CUDA or the CPU. Each engine has one profile, the first one of
`backends.profiles`, which covers decoding too: with several, ONNX Runtime would need a choice at every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any

from visprune.bundle import Bundle
from visprune.caches import cache_dir
from visprune.errors import BundleError, InputError, MissingExtraError, UnsupportedError
from visprune.manifest import InputRange
from visprune.optional import require
from visprune.runtime.backends.ort import CPU, CUDA, OrtRunner, Provider, open_graph, settings_for
from visprune.runtime.backends.profiles import Limits, profiles
from visprune.runtime.backends.runner import BackendOptions, Runner, Specs, Value, shape_of

__all__ = ["RTX", "TENSORRT", "BoundedRunner", "open_cuda", "open_tensorrt", "open_tensorrt_rtx"]

TENSORRT = "TensorrtExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"

_WORKSPACE = str(2 << 30)  # bytes of working memory that a layer may use
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def open_cuda(bundle: Bundle, graph: str, options: BackendOptions) -> OrtRunner:
    """Load a graph on the first NVIDIA GPU with CUDA.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or was built without CUDA.
        UnsupportedError: CUDA cannot be used: there is no GPU, no driver, or a library is missing.
        BundleError: ONNX Runtime cannot read the graph, or the graph differs from the manifest.
    """
    ort = _require_build_with(CUDA, "CUDA")
    settings = settings_for(ort, bundle, graph, options, gpu=True)
    return _load_with(CUDA, "CUDA", lambda: open_graph(ort, bundle, graph, settings, [(CUDA, {}), (CPU, {})]))


def open_tensorrt(bundle: Bundle, graph: str, options: BackendOptions) -> BoundedRunner:
    """Load a graph with TensorRT, and the parts that it does not support with CUDA.

    Raises:
        MissingExtraError: TensorRT is not installed, or ONNX Runtime was built without it.
        UnsupportedError: TensorRT cannot be used: there is no GPU, no driver, or its version is not the one
            that ONNX Runtime needs.
        BundleError: As for `open_cuda`.
    """
    ort = _require_build_with(TENSORRT, "TensorRT")
    trt = require("tensorrt", extra="tensorrt")  # importing it loads the library that the provider needs
    ranges = _ranges(bundle, graph)
    folder = _engine_folder(bundle, graph, ranges, f"tensorrt-{trt.__version__}-{ort.__version__}")
    own = {
        "device_id": "0",
        "trt_max_workspace_size": _WORKSPACE,
        "trt_fp16_enable": str(bundle.manifest.dtype == "float16"),
        "trt_int8_enable": str(_has_int8(bundle, graph)),
        **_profile_options("trt", ranges),
    }
    if folder is not None:
        own |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": folder}
        own |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": folder}
    settings = settings_for(ort, bundle, graph, options, gpu=True)
    chosen: list[Provider] = [(TENSORRT, own), (CUDA, {}), (CPU, {})]
    runner = _load_with(TENSORRT, "TensorRT", lambda: open_graph(ort, bundle, graph, settings, chosen))
    return BoundedRunner(runner, graph, ranges)


def open_tensorrt_rtx(bundle: Bundle, graph: str, options: BackendOptions) -> BoundedRunner:
    """Load a graph with TensorRT-RTX, built into ONNX Runtime or from NVIDIA's plug-in package.

    Raises:
        MissingExtraError: ONNX Runtime was built without it, and the plug-in is not installed.
        UnsupportedError: TensorRT-RTX cannot be used: there is no supported GPU, or no driver.
        BundleError: As for `open_cuda`.
    """
    ort = require("onnxruntime", extra="cpu")
    ranges = _ranges(bundle, graph)
    settings = settings_for(ort, bundle, graph, options, gpu=True)
    own = {"nv_max_workspace_size": _WORKSPACE, **_profile_options("nv", ranges)}
    folder = _engine_folder(bundle, graph, ranges, f"tensorrt-rtx-{ort.__version__}")
    if folder is not None:
        own["nv_runtime_cache_path"] = folder
    if RTX in ort.get_available_providers():
        chosen: list[Provider] = [(RTX, {"device_id": "0", **own}), (CPU, {})]
    else:
        settings.add_provider_for_devices(_plugin_devices(ort)[:1], own)
        chosen = []  # the settings name the provider
    runner = _load_with(RTX, "TensorRT-RTX", lambda: open_graph(ort, bundle, graph, settings, chosen))
    return BoundedRunner(runner, graph, ranges)


class BoundedRunner:
    """A runner that refuses inputs larger than the profile of its engines.

    Args:
        runner: Runner of the graph.
        graph: Name for messages.
        ranges: Ranges of the inputs that vary.
    """

    def __init__(self, runner: Runner, graph: str, ranges: Mapping[str, InputRange]) -> None:
        self._runner = runner
        self._graph = graph
        self._ranges = ranges

    @property
    def specs(self) -> Specs:
        """Inputs and outputs."""
        return self._runner.specs

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`.

        Raises:
            InputError: An input is larger than the profile.
            UnsupportedError: There is not enough memory.
        """
        for name, value in feeds.items():
            shape = shape_of(value)
            most = self._ranges[name].most if name in self._ranges else shape
            if shape and any(dim > top for dim, top in zip(shape, most, strict=True)):
                raise InputError(
                    f"{name!r} of {self._graph} is {list(shape)}, and its engine takes at most {list(most)}.",
                    "Shorten the conversation or show fewer pictures at once, or use --provider cuda.",
                )
        return self._runner.infer(feeds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)


def _require_build_with(provider: str, name: str) -> ModuleType:
    """Import ONNX Runtime, and refuse a build that lacks an execution provider."""
    ort = require("onnxruntime", extra="gpu")
    if provider not in ort.get_available_providers():
        raise MissingExtraError(
            f"The installed ONNX Runtime {ort.__version__} has no {name} in it.",
            "The two builds clash, so run: pip uninstall -y onnxruntime onnxruntime-gpu; "
            'then: pip install "visprune[gpu]".',
        )
    if hasattr(ort, "preload_dlls"):  # finds the CUDA and cuDNN libraries that pip installed
        ort.preload_dlls()
    return ort


def _plugin_devices(ort: ModuleType) -> list[Any]:
    """Return the devices of NVIDIA's plug-in."""
    try:
        plugin = require(_PLUGIN, extra="cpu")
    except MissingExtraError:
        raise MissingExtraError(
            f"The installed ONNX Runtime {ort.__version__} has no TensorRT-RTX in it.",
            "Install NVIDIA's plug-in: pip install onnxruntime-ep-nv-tensorrt-rtx.",
        ) from None
    name = plugin.get_ep_name()
    try:
        if not any(device.ep_name == name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as error:  # an ONNX Runtime before 1.23 has no plug-ins; a library may be missing
        raise _not_started("TensorRT-RTX", str(error)) from None
    if not devices:
        raise _not_started("TensorRT-RTX", "it finds no GPU")
    return devices


def _load_with(provider: str, name: str, load: Callable[[], OrtRunner]) -> OrtRunner:
    """Load a graph, and refuse it if ONNX Runtime only warned and fell back to another provider."""
    try:
        runner = load()
    except BundleError as error:
        if "install TensorRT" in error.what:
            raise _not_started(name, "it finds no libraries of a version that it can use") from None
        raise
    if provider not in runner.providers:
        raise _not_started(name, f"it would have used {' and '.join(runner.providers)}")
    return runner


def _not_started(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"ONNX Runtime could not start {name}: {why.rstrip('.')}.",
        f"Check the driver and the libraries of {name} (`visprune doctor` shows what is found), or use "
        "--provider cpu.",
    )


def _has_int8(bundle: Bundle, graph: str) -> bool:
    quantization = bundle.manifest.quantization
    return quantization is not None and "int8" in quantization.precisions(graph)


def _ranges(bundle: Bundle, graph: str) -> dict[str, InputRange]:
    """Return the ranges of the inputs that vary, for the default lengths of `visprune build`."""
    found = profiles(bundle.manifest, Limits())[graph]
    return found[0].inputs if found else {}


def _profile_options(prefix: str, ranges: Mapping[str, InputRange]) -> dict[str, str]:
    """Return the provider options that describe a profile."""
    if not ranges:
        return {}
    return {
        f"{prefix}_profile_{option}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(one, which)))}" for name, one in ranges.items()
        )
        for option, which in (("min", "least"), ("opt", "usual"), ("max", "most"))
    }


def _engine_folder(bundle: Bundle, graph: str, ranges: Mapping[str, InputRange], version: str) -> str | None:
    """Create and return the directory in which a graph's engines are cached.

    Every graph has its own, because ONNX Runtime finds engines by names in the graph only. Return None if it
    cannot be created; the engines are then built at every load.
    """
    manifest = bundle.manifest
    files = (manifest.graphs[graph].file, manifest.graphs[graph].data)
    hashes = [manifest.files[file].sha256 for file in files if file]
    told = json.dumps([version, *hashes, _profile_options("", ranges)])
    folder = cache_dir("ort-engines") / hashlib.sha256(told.encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder)
