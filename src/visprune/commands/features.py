"""Features that work with the packages and the GPU of a machine; for the others, the reason and a remedy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from visprune import machine
from visprune.errors import UnsupportedError
from visprune.machine import HERE, Gpu, Jetson, System
from visprune.targets import PACKAGES, TARGETS, Target, check_version

__all__ = ["Feature", "Found", "Package", "features", "look"]

_PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
# Packages, and the distributions that may contain them. The TensorRT of a Jetson's system is not from pip.
_PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "safetensors": ("safetensors",),
    "onnx-ir": ("onnx-ir",),
    "ml-dtypes": ("ml-dtypes",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    _PLUGIN: (f"{_PLUGIN}-cu13", f"{_PLUGIN}-cu12"),
    "polygraphy": ("polygraphy",),
    "cuda-bindings": ("cuda-bindings",),
    "fastapi": ("fastapi",),
    "uvicorn": ("uvicorn",),
    "prometheus-client": ("prometheus-client",),
    "llguidance": ("llguidance",),
    "ray": ("ray",),
}
_EXPORT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")
_QUANTIZE = ("onnx-ir", "ml-dtypes")
_BUILD = ("polygraphy", "onnx-ir", "ml-dtypes")
_ON_A_GPU = ("cuda-bindings",)
_SERVE = ("fastapi", "uvicorn", "prometheus-client")


@dataclass(frozen=True, slots=True)
class Package:
    """A package and its version; None: it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature. If it does not work, the note says why, and what to install."""

    name: str
    works: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The packages and hardware of a machine.

    Attributes:
        packages: By name.
        providers: The providers that ONNX Runtime was built with.
        trouble: Why ONNX Runtime cannot tell its providers.
        gpu: See `visprune.machine`.
        jetson: See `visprune.machine`.
        system_tensorrt: Version of the TensorRT for Python that belongs to a Jetson's system.
    """

    packages: dict[str, Package]
    providers: tuple[str, ...] = ()
    trouble: str = ""
    gpu: Gpu | None = None
    jetson: Jetson | None = None
    system_tensorrt: str | None = None

    def has(self, *names: str) -> bool:
        """Return whether all of these packages are installed."""
        return all(self.packages[name].version for name in names)

    def missing(self, names: tuple[str, ...], extra: str) -> str:
        """Return which of some packages are missing and the command that installs them; empty if none is."""
        absent = [name for name in names if not self.packages[name].version]
        return f'missing {", ".join(absent)}; pip install "visprune[{extra}]"' if absent else ""


def look(system: System = HERE) -> Found:
    """Find the packages and hardware of a machine."""
    providers, trouble = _providers()
    jetson = machine.jetson(system)
    return Found(
        {name: Package(name, _version(distributions)) for name, distributions in _PACKAGES.items()},
        providers,
        trouble,
        machine.gpu(system),
        jetson,
        machine.package("python3-libnvinfer", system) if jetson else None,
    )


def features(found: Found) -> list[Feature]:
    """Return every feature, in the order in which a bundle is made and used."""
    made = [
        _needs("export", found.missing(_EXPORT, "export")),
        _needs("quantize", found.missing(_QUANTIZE, "quantize")),
        *(_builds(found, one) for one in TARGETS.values() if one.builds_engines),
        _needs("run on cpu", _without_cpu(found)),
    ]
    made += [_needs(f"run on {name}", why) for name, why in _providers_that_fail(found)]
    return [
        *made,
        _needs("answers in JSON", found.missing(("llguidance",), "structured")),
        _needs("serve", found.missing(_SERVE, "serve")),
        _needs("serve with replicas", found.missing((*_SERVE, "ray"), "serve,distributed")),
    ]


def _needs(name: str, why_not: str) -> Feature:
    return Feature(name, not why_not, why_not)


def _without_cpu(found: Found) -> str:
    return (
        "" if "CPUExecutionProvider" in found.providers else f'{found.trouble}; pip install "visprune[cpu]"'
    )


def _providers_that_fail(found: Found) -> Iterator[tuple[str, str]]:
    """Yield every provider on a GPU with the reason why it cannot run, which is empty if it can."""
    clash = found.has("onnxruntime") and found.has("onnxruntime-gpu")
    wheel = 'pip uninstall -y onnxruntime onnxruntime-gpu; pip install "visprune[gpu]"'
    if found.jetson:
        wheel = "no package index has ONNX Runtime with CUDA for a Jetson; use --provider tensorrt"
    if clash:
        gpu_wheel = f"onnxruntime and onnxruntime-gpu are both installed and clash; {wheel}"
    else:
        gpu_wheel = "" if "CUDAExecutionProvider" in found.providers else wheel
    yield "cuda", _no_gpu(found) or gpu_wheel
    extra = "jetson" if found.jetson else "tensorrt"
    yield "tensorrt", _no_gpu(found) or _no_tensorrt(found) or found.missing(_ON_A_GPU, extra)
    yield "tensorrt-rtx", _no_rtx_gpu(found) or found.missing(("tensorrt-rtx", *_ON_A_GPU), "tensorrt-rtx")
    yield "ort-tensorrt", _no_gpu(found) or gpu_wheel or _no_tensorrt(found)
    plugin = found.has(_PLUGIN) or "NvTensorRTRTXExecutionProvider" in found.providers
    yield "ort-tensorrt-rtx", _no_rtx_gpu(found) or ("" if plugin else f"pip install {_PLUGIN}")


def _builds(found: Found, target: Target) -> Feature:
    """Return whether engines can be built for a target: TensorRT-RTX needs no GPU, TensorRT needs its own."""
    name = f"build engines for {target.name}"
    if target.anywhere:
        package = PACKAGES[target.engines].extra  # the extra is named like the distribution
        why = found.missing((package, *_BUILD), package)
        return _needs(name, why or _wrong_version(found, target, package))
    why = _no_gpu(found)
    if not why and found.gpu is not None and found.gpu.sm not in target.sms:
        wanted = " or ".join(f"SM{sm}" for sm in target.sms)
        why = f"engines are built on the machine that runs them: this is SM{found.gpu.sm}, not {wanted}"
    extra = "jetson" if target.jetson else "tensorrt"
    why = why or _no_tensorrt(found) or found.missing(_BUILD, extra)
    return _needs(name, why or _wrong_version(found, target, "tensorrt"))


def _wrong_version(found: Found, target: Target, package: str) -> str:
    try:
        check_version(target.name, found.packages[package].version or "")
    except UnsupportedError as error:
        return f"{error.what} {error.hint}"
    return ""


def _no_gpu(found: Found) -> str:
    if found.gpu is None:
        return "no NVIDIA GPU with a driver found"
    if not found.gpu.answers and found.has(*_ON_A_GPU):  # the driver is asked through these packages
        return (
            "the GPU's driver does not answer: a container needs --runtime nvidia, a user the groups video "
            "and render"
        )
    return ""


def _no_rtx_gpu(found: Found) -> str:
    sms = TARGETS["rtx"].sms
    if found.gpu and found.gpu.sm not in sms:
        return f"TensorRT-RTX knows SM {', '.join(map(str, sms))}, and this GPU is SM{found.gpu.sm}"
    return _no_gpu(found)


def _no_tensorrt(found: Found) -> str:
    if found.has("tensorrt"):
        return ""
    if not found.jetson:
        return found.missing(("tensorrt",), "tensorrt")
    if not found.system_tensorrt:
        return "the system has no TensorRT for Python; sudo apt-get install nvidia-jetpack"
    if sys.prefix != sys.base_prefix:
        again = "/usr/bin/python3 -m venv --system-site-packages"
        return f"this environment hides the system's TensorRT {found.system_tensorrt}; make it with: {again}"
    return f"the system's TensorRT {found.system_tensorrt} is for /usr/bin/python3, not for {sys.executable}"


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except Exception:  # a half-removed package has metadata that cannot be read
            continue
    return None


def _providers() -> tuple[tuple[str, ...], str]:
    """Return the providers that ONNX Runtime was built with, or why it cannot tell them."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return (), "ONNX Runtime is not installed"
    except Exception as error:  # such as a wheel for another platform, or a missing system library
        return (), f"ONNX Runtime cannot be imported: {error}"
    try:
        return tuple(onnxruntime.get_available_providers()), ""
    except Exception as error:  # both builds installed in one environment overwrite each other's files
        both = "pip uninstall -y onnxruntime onnxruntime-gpu, install one"
        return (), f"ONNX Runtime is damaged ({error}): {both}"
