"""From one ONNX file to one serialized engine, by Polygraphy, for `tensorrt` and `tensorrt_rtx` alike.

Networks are strongly typed: what an ONNX file says of types is what is computed. The file is read by
TensorRT's own parser, because Polygraphy prints what that could not read, and does not tell. Runs in a
process of its own, see `child`: in one process Polygraphy drives one of the two packages.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from visprune.errors import EngineError, UsageError
from visprune.manifest import EngineProfile
from visprune.optional import require
from visprune.staging import whole
from visprune.targets import PACKAGES

__all__ = ["WORKSPACE", "Caps", "Flavour", "Request", "build_engine"]

WORKSPACE = 2 << 30
"""Bytes of device memory that a layer may use while it runs, by default."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, slots=True)
class Caps:
    """How much memory a build may take.

    Attributes:
        workspace: Bytes of device memory that a layer may use while it runs.
        host: Bytes of memory of the process that builds; None: as much as there is.

    Raises:
        UsageError: What is no whole number of at least 1.
    """

    workspace: int = WORKSPACE
    host: int | None = None

    def __post_init__(self) -> None:
        for value in (self.workspace, self.host):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"A cap on memory is {value}.", "Give a positive whole number of bytes.")


@dataclass(frozen=True, slots=True)
class Request:
    """One engine to build.

    Attributes:
        graph: Its name, for people.
        onnx: The file; its data lies beside it.
        output: The file to write.
        flavour: The package that builds it.
        sm: Of the GPUs that it is for; by `tensorrt` that of the one that is here.
        timing_cache: A file of what TensorRT measured, read where it is there, and extended; None: there is
            none.
        workspace: Bytes of device memory that a layer may use while it runs.
    """

    graph: str
    onnx: str
    output: str
    flavour: Flavour
    sm: int
    profiles: tuple[EngineProfile, ...]
    timing_cache: str | None = None
    workspace: int = WORKSPACE


def build_engine(request: Request) -> None:
    """Parse, set profiles, build, write.

    Raises:
        EngineError: The graph cannot be read, or not be built, or the engine not be written.
        MissingExtraError: A package is not installed.
    """
    package = PACKAGES[request.flavour]
    trt = require(request.flavour, extra=package.extra)
    choice = require("polygraphy.config", extra=package.extra)
    choice.USE_TENSORRT_RTX = request.flavour == "tensorrt_rtx"  # type: ignore[attr-defined]
    polygraphy = require("polygraphy.backend.trt", extra=package.extra)
    failed = require("polygraphy.exception", extra=package.extra).PolygraphyException
    name = f"{package.name} {trt.__version__}"
    with _errors() as errors, _measured(request.timing_cache) or nullcontext() as measured:
        try:
            builder, network = polygraphy.create_network(strongly_typed=True)
            parser = trt.OnnxParser(network, polygraphy.get_trt_logger())
            if not parser.parse_from_file(request.onnx):
                raise _unreadable(parser, request.graph, name)
            config = polygraphy.create_config(
                builder,
                network,
                profiles=[_profile(polygraphy.Profile(), network, wanted) for wanted in request.profiles],
                memory_pool_limits={trt.MemoryPoolType.WORKSPACE: request.workspace},
                load_timing_cache=measured,
                profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
                tf32=True,  # TensorRT's own default, which Polygraphy would turn off
            )
            if request.flavour == "tensorrt_rtx":
                _build_for(trt, config, request.sm, name)
            built = polygraphy.engine_bytes_from_network((builder, network), config)
        except failed:
            raise _not_built(request, name, errors) from None
    _write(request, built)
    if request.timing_cache:
        with suppress(OSError), whole(Path(request.timing_cache)) as file:  # else it is measured again
            file.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _measured(timing_cache: str | None) -> BinaryIO | None:
    """What was measured before, opened; by a path, Polygraphy would fail where it may not lock the file."""
    if timing_cache is not None:
        with suppress(OSError):
            return Path(timing_cache).open("rb")
    return None


def _write(request: Request, built: Any) -> None:
    try:
        with whole(Path(request.output)) as file:
            file.write_bytes(memoryview(built))
    except OSError as error:
        raise EngineError(
            f"The engine of {request.graph} cannot be written: {error.strerror or error}.",
            "Free some space, or choose another disk with -o.",
        ) from None


@contextmanager
def _errors() -> Iterator[list[str]]:
    """Print on stderr what TensorRT says through Polygraphy; gives its errors, as they come."""
    logger = require("polygraphy.logger", extra="tensorrt").G_LOGGER
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr, flush=True)
            if record.levelno == logging.ERROR:  # a critical one is Polygraphy's, and says less
                found.append(record.getMessage())

    logger.use_python_logging_system, logger.colors, logger.letter = True, False, False
    logger.module_severity = logger.WARNING
    handler = Handler()
    logger.python_logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.python_logger.removeHandler(handler)


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
    if "initializer" in said or "weight" in said or "external" in said or "open file" in said:
        return "The data beside the graph likely cannot be read: copy the bundle again."
    if "importer" in said or "plugin" in said or "unsupported" in said:
        return (
            f"This TensorRT likely has no {operator or 'such operator'}: update it, or export for its target."
        )
    return "The graph was likely exported for another target: export it for this one."


def _profile(empty: Any, network: Any, wanted: EngineProfile) -> Any:
    """Polygraphy's form of a profile. A count that no shape depends on is an input like others, and fixed."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        ranges = wanted.inputs.get(tensor.name)
        if ranges and (tensor.is_shape_tensor or len(tensor.shape) == len(ranges.least)):
            empty.add(tensor.name, ranges.least, ranges.usual, ranges.most)
    return empty


def _not_built(request: Request, name: str, errors: list[str]) -> EngineError:
    said = " ".join(errors[-1].split()).rstrip(".") if errors else "it did not say why"
    hint = "Try smaller limits; if that does not help, report the graph and this message."
    if "workspace" in said.lower():
        hint = "Give a larger --workspace."
    return EngineError(f"{name} could not build {request.graph} for SM{request.sm}: {said}.", hint)


def _build_for(trt: Any, config: Any, sm: int, name: str) -> None:
    """Have TensorRT-RTX build for GPUs that need not be here; of this Polygraphy knows nothing."""
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        raise EngineError(f"{name} does not know SM{sm}.", "Update it: pip install -U tensorrt-rtx.")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # else its runs may not be captured: CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
