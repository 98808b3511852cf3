"""From one ONNX file to one serialized engine, by the calls that `tensorrt` and `tensorrt_rtx` share.

Networks are strongly typed: what an ONNX file says of types is what is computed. Runs in a process of its
own, see `child`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visprune.errors import EngineError
from visprune.manifest import EngineProfile
from visprune.optional import require

__all__ = ["WORKSPACE", "Flavour", "Request", "build_engine", "library"]

WORKSPACE = 2 << 30
"""Bytes of device memory that a layer may use while it runs."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]

_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@dataclass(frozen=True, slots=True)
class Request:
    """One engine to build.

    Attributes:
        graph: Its name, for people.
        onnx: The file; its data lies beside it.
        output: The file to write.
        timing_cache: A file that is read where it is there, and replaced; None: there is none.
    """

    graph: str
    onnx: str
    output: str
    flavour: Flavour
    sm: int
    profiles: tuple[EngineProfile, ...]
    timing_cache: str | None = None
    workspace: int = WORKSPACE


def library(flavour: Flavour) -> Any:
    """The TensorRT of a flavour.

    Raises:
        MissingExtraError: It is not installed.
    """
    return require(flavour, extra=flavour.replace("_", "-"))


def build_engine(request: Request) -> None:
    """Parse, set profiles, build, write.

    Raises:
        EngineError: The graph cannot be read, or not be built.
        MissingExtraError: The package is not installed.
    """
    trt = library(request.flavour)
    name = f"{_NAMES[request.flavour]} {trt.__version__}"
    log = _logger(trt)
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.onnx):
        raise _unreadable(parser, request.graph, name)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if request.flavour == "tensorrt_rtx":  # built for GPUs that need not be here
        capability = getattr(trt.ComputeCapability, f"SM{request.sm}", None)
        if capability is None:
            raise EngineError(
                f"{name} does not know SM{request.sm}.", 'Update it: pip install -U "visprune[tensorrt-rtx]".'
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    timings = _timing_cache(config, request.timing_cache)
    for wanted in request.profiles:
        config.add_optimization_profile(_profile(builder, network, wanted))
    built = builder.build_serialized_network(network, config)
    if built is None:
        said = " ".join(log.errors[-1].split()) if log.errors else "it did not say why"
        raise EngineError(
            f"{name} could not build {request.graph} for SM{request.sm}: {said.rstrip('.')}.",
            "Try smaller limits; if that does not help, report the graph and this message.",
        )
    Path(request.output).write_bytes(memoryview(built))
    _save(timings, request.timing_cache)


def _logger(trt: Any) -> Any:
    """Prints what TensorRT says, on stderr, and remembers its errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                print(message, file=sys.stderr, flush=True)

    return Log()


def _unreadable(parser: Any, graph: str, name: str) -> EngineError:
    """The first thing that the parser could not read: the others often follow from it."""
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split()).rstrip(".")
    node = f" at node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else ""
    return EngineError(f"{name} cannot read {graph}{node}: {text}.", _cause(text, error.node_operator()))


def _cause(text: str, operator: str) -> str:
    """What a parser error likely comes from."""
    said = text.lower()
    if "opset" in said:
        return "The graph is of an opset that this TensorRT does not know: update TensorRT."
    if "importer" in said or "plugin" in said or "unsupported" in said:
        return (
            f"This TensorRT likely has no {operator or 'such operator'}: update it, or export for its target."
        )
    if "weight" in said or "external" in said or "open file" in said:
        return "The data beside the graph likely cannot be read: copy the bundle again."
    return "The graph was likely exported for another target: export it for this one."


def _profile(builder: Any, network: Any, wanted: EngineProfile) -> Any:
    """TensorRT's form of a profile. A count that no shape depends on needs none."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        ranges = wanted.inputs.get(tensor.name)
        if ranges is None:
            continue
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, list(ranges.least), list(ranges.usual), list(ranges.most))
        elif len(tensor.shape) == len(ranges.least):
            profile.set_shape(tensor.name, ranges.least, ranges.usual, ranges.most)
    return profile


def _timing_cache(config: Any, path: str | None) -> Any:
    """What was measured by earlier builds; one that cannot be read is begun anew."""
    if path is None:
        return None
    file = Path(path)
    for content in [file.read_bytes()] if file.is_file() else []:
        known = config.create_timing_cache(content)
        if known is not None and config.set_timing_cache(known, False):
            return known
    known = config.create_timing_cache(b"")
    if known is None or not config.set_timing_cache(known, False):
        return None
    return known


def _save(timings: Any, path: str | None) -> None:
    """Keep the measurements: whole or not at all; it is no harm if another process was later."""
    content = timings.serialize() if timings is not None and path is not None else None
    if content is None or path is None:
        return
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_bytes(memoryview(content))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
