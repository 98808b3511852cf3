"""Deployment targets, in a table: the graphs, precisions and TensorRT versions of each.

The native flavour keeps `Attention`, `RMSNormalization` and `RotaryEmbedding` as single operators (opset 23),
for which ONNX Runtime and TensorRT from 10.15 have kernels. The primitive flavour expresses them by simpler
operators at opset 19, which TensorRT from 10.3 is documented to read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from visprune.errors import MissingExtraError, UnsupportedError
from visprune.names import lookup
from visprune.optional import require

__all__ = [
    "DTYPES",
    "FP8_SM",
    "PACKAGES",
    "TARGETS",
    "WIDTHS",
    "EnginePackage",
    "Engines",
    "Target",
    "check_sm",
    "check_version",
    "export_for",
    "in_place",
    "no_engines",
    "target",
    "tensorrt",
]

Flavour = Literal["native", "primitive"]
DType = Literal["float32", "float16"]
Engines = Literal["", "tensorrt", "tensorrt_rtx"]

DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16"}
"""Dtypes of weights and activations, by their names in commands."""

WIDTHS: dict[str, str] = {dtype: name for name, dtype in DTYPES.items()}
"""Names of dtypes in commands, by dtype."""

FP8_SM = 89
"""The first SM with 8-bit floating point; 89 is Ada (RTX 40)."""


@dataclass(frozen=True, slots=True)
class EnginePackage:
    """One of the two Python packages that build engines and run them.

    Attributes:
        name: Name for people.
        extra: Extra of visprune that installs it; also the name of the package's own project.
        in_place: The first version that was tried, or is documented, to write a cache in place (ONNX
            `TensorScatter`).
    """

    name: str
    extra: str
    in_place: str


PACKAGES = {
    "tensorrt": EnginePackage("TensorRT", "tensorrt", "10.15"),
    "tensorrt_rtx": EnginePackage("TensorRT-RTX", "tensorrt-rtx", "1.7"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A platform to export for.

    Attributes:
        name: Name for `--target`.
        about: One line for people.
        flavour: Flavour of the graphs, native or primitive.
        opset: ONNX operator set.
        dtype: Dtype of weights and activations unless the user asks for another.
        quantized: Precisions that its graphs can be quantized to.
        engines: Python package that builds its engines and runs them; empty if ONNX Runtime runs its graphs.
        versions: Versions of that package: the lowest, and the first that is too new.
        sms: SMs that the engines may run on, as TensorRT names them (86 is 8.6).
        anywhere: Whether engines can be built on any machine, and not only on one with the GPU.
    """

    name: str
    about: str
    flavour: Flavour
    opset: int
    dtype: DType
    quantized: tuple[str, ...]
    engines: Engines = ""
    versions: tuple[str, str] = ("", "")
    sms: tuple[int, ...] = ()
    anywhere: bool = False

    @property
    def builds_engines(self) -> bool:
        """Whether its graphs are built to TensorRT engines, and not run by ONNX Runtime."""
        return bool(self.engines)

    @property
    def jetson(self) -> bool:
        """Whether it is a Jetson, whose system includes TensorRT."""
        return self.name.startswith("jetpack")


_RTX = (75, 80, 86, 89, 120, 121)
_X86 = (75, 80, 86, 89, 90, 100, 103, 120, 121)

# fmt: off
TARGETS = {
    t.name: t
    for t in (
        Target("onnxruntime", "ONNX Runtime on a CPU or an NVIDIA GPU",
               "native", 23, "float32", ("int8", "int8-dynamic", "int8-weights", "fp8", "int4")),
        Target("jetpack6", "Jetson Orin with JetPack 6",
               "primitive", 19, "float16", ("int8", "int4"), "tensorrt", ("10.3", "11"), (87,)),
        Target("jetpack7-orin", "Jetson Orin with JetPack 7.2 or newer",
               "native", 23, "float16", ("int8", "int4"), "tensorrt", ("10.15", "12"), (87,)),
        Target("jetpack7.0-thor", "Jetson Thor with JetPack 7.0 or 7.1",
               "primitive", 19, "float16", ("int8", "fp8", "int4"), "tensorrt", ("10.13", "10.15"), (110,)),
        Target("jetpack7-thor", "Jetson Thor with JetPack 7.2 or newer",
               "native", 23, "float16", ("int8", "fp8", "int4"), "tensorrt", ("10.15", "12"), (110,)),
        Target("tensorrt", "NVIDIA GPUs on x86",
               "native", 23, "float16", ("int8", "fp8", "int4"), "tensorrt", ("10.15", "12"), _X86),
        Target("rtx", "NVIDIA RTX GPUs",
               "native", 23, "float16", ("int8", "fp8", "int4"), "tensorrt_rtx", ("1.4", "2"), _RTX, True),
    )
}
# fmt: on


def target(name: str) -> Target:
    """Return the target of a name.

    Raises:
        UsageError: No target has this name.
    """
    return lookup(name, TARGETS, "target")


def check_sm(precisions: Sequence[str], sm: int) -> None:
    """Refuse precisions that a GPU cannot compute in, before an engine is built.

    Args:
        precisions: Precisions of the parts of a bundle.
        sm: SM of the GPU, such as 86.

    Raises:
        UnsupportedError: One is fp8, and the SM is below 89.
    """
    if "fp8" in precisions and sm < FP8_SM:
        raise UnsupportedError(
            f"SM{sm} has no fp8: that begins with SM{FP8_SM}.",
            "Quantize with --precision int8 for this GPU.",
        )


def check_version(name: str, version: str) -> None:
    """Refuse a version of TensorRT that a target does not take.

    Args:
        name: Name of the target.
        version: Version of its package, such as "10.16.1.11".

    Raises:
        UnsupportedError: The version is too old or too new, or the target has no engines.
    """
    known = target(name)
    if not known.engines:
        raise no_engines(name)
    least, beyond = known.versions
    if _numbers(least) <= _numbers(version) < _numbers(beyond):
        return
    package, other = PACKAGES[known.engines], _other(known, version)
    if other is not None:
        hint = f"Export for {other}, which takes this version."
    elif known.jetson:
        hint = "Use the TensorRT of the JetPack that the target is for."
    else:
        hint = f'Install another: pip install "{package.extra}>={least},<{beyond}".'
    raise UnsupportedError(
        f"This is {package.name} {version}, and the target {name} takes {least} and newer, below {beyond}.",
        hint,
    )


def no_engines(name: str) -> UnsupportedError:
    """Return the error for a target whose graphs ONNX Runtime runs."""
    others = ", ".join(one.name for one in TARGETS.values() if one.engines)
    return UnsupportedError(f"The target {name} has no engines.", f"Take one of: {others}.")


def in_place(name: str, version: str) -> bool:
    """Return whether engines of a target write their caches in place, by ONNX `TensorScatter` (opset 24).

    Only engines of native graphs do. The opset and operators of primitive graphs are chosen for versions of
    TensorRT that do not have it.

    Args:
        name: Name of the target.
        version: Version of its TensorRT.
    """
    known = target(name)
    if known.flavour != "native" or not known.engines:
        return False
    return _numbers(version) >= _numbers(PACKAGES[known.engines].in_place)


def tensorrt(name: str) -> Any:
    """Import and return the TensorRT package of a target.

    Raises:
        MissingExtraError: The package is not installed.
        UnsupportedError: The target does not take its version, or has no engines.
    """
    known = target(name)
    if not known.engines:
        raise no_engines(name)
    try:
        found = require(known.engines, extra=PACKAGES[known.engines].extra)
    except MissingExtraError as error:
        if not known.jetson:
            raise
        raise MissingExtraError(
            error.what,
            "It comes with JetPack: sudo apt install python3-libnvinfer, and make the environment with "
            "python3 -m venv --system-site-packages.",
        ) from None
    check_version(name, str(found.__version__))
    return found


def export_for(sm: int) -> str:
    """Return the hint for a GPU that a target does not take."""
    fits = [one.name for one in TARGETS.values() if sm in one.sms]
    return f"Export for {' or '.join(fits)}." if fits else "No target of this visprune is for this GPU."


def _other(known: Target, version: str) -> str | None:
    """Return another target for the same SMs that takes a version of TensorRT; None if there is none."""
    for one in TARGETS.values():
        if one.engines == known.engines and set(one.sms) & set(known.sms):
            least, beyond = map(_numbers, one.versions)
            if least <= _numbers(version) < beyond:
                return one.name
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
