"""Builder of one serialized engine from one ONNX file, by Polygraphy, for `tensorrt` and `tensorrt_rtx`.

Networks are strongly typed: an engine computes in the types that the ONNX file has. TensorRT's own parser
reads the file, because Polygraphy only prints the parser's errors and does not return them. Each build runs
in a subprocess (see `build_process`), because Polygraphy can use only one of the two packages in a process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from visprune.engines.build_options import WORKSPACE
from visprune.errors import EngineError
from visprune.manifest import EngineProfile
from visprune.optional import require
from visprune.staging import whole
from visprune.targets import PACKAGES

__all__ = ["Flavour", "Request", "build_engine"]

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""The Python package that builds an engine."""


@dataclass(frozen=True, slots=True)
class Request:
    """One engine to build.

    Attributes:
        graph: Name of the graph, for messages.
        onnx: The ONNX file, with its data file beside it.
        output: The file to write.
        flavour: The package that builds it.
        sm: Compute capability, times ten, of the GPUs that the engine is for. With `tensorrt` it is that of
            the GPU of this machine.
        profiles: The optimization profiles of the engine.
        timing_cache: A file of TensorRT's measurements; it is read if it exists, and extended. None: no
            measurements are kept.
        workspace: Bytes of GPU memory that a layer may use while it runs.
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
    """Parse an ONNX file, build its engine, and write it.

    Raises:
        EngineError: The graph cannot be read or built, or the engine cannot be written.
        MissingExtraError: A package is not installed.
    """
    package = PACKAGES[request.flavour]
    trt = require(request.flavour, extra=package.extra)
    choice = require("polygraphy.config", extra=package.extra)
    choice.USE_TENSORRT_RTX = request.flavour == "tensorrt_rtx"  # type: ignore[attr-defined]
    polygraphy = require("polygraphy.backend.trt", extra=package.extra)
    failed = require("polygraphy.exception", extra=package.extra).PolygraphyException
    name = f"{package.name} {trt.__version__}"
    with _logged_errors() as errors, _open_timings(request.timing_cache) or nullcontext() as timings:
        try:
            builder, network = polygraphy.create_network(strongly_typed=True)
            parser = trt.OnnxParser(network, polygraphy.get_trt_logger())
            if not parser.parse_from_file(request.onnx):
                raise _parser_error(parser, request.graph, name)
            config = polygraphy.create_config(
                builder,
                network,
                profiles=[_profile(polygraphy.Profile(), network, wanted) for wanted in request.profiles],
                memory_pool_limits={trt.MemoryPoolType.WORKSPACE: request.workspace},
                load_timing_cache=timings,
                profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
                tf32=True,  # the default of TensorRT, which Polygraphy would turn off
            )
            if request.flavour == "tensorrt_rtx":
                _set_compute_capability(trt, config, request.sm, name)
            built = polygraphy.engine_bytes_from_network((builder, network), config)
        except failed:
            raise _build_error(request, name, errors) from None
    _write(request, built)
    if request.timing_cache:
        # If the file cannot be written, TensorRT measures again in the next build.
        with suppress(OSError), whole(Path(request.timing_cache)) as file:
            file.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _open_timings(timing_cache: str | None) -> BinaryIO | None:
    """Open the file of earlier measurements, if there is one.

    Polygraphy takes a path too, but then fails if it may not lock the file.
    """
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
def _logged_errors() -> Iterator[list[str]]:
    """Print the messages of TensorRT on stderr, and yield a list that its errors are appended to."""
    logger = require("polygraphy.logger", extra="tensorrt").G_LOGGER
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr, flush=True)
            if record.levelno == logging.ERROR:  # critical ones come from Polygraphy, and say less
                found.append(record.getMessage())

    logger.use_python_logging_system, logger.colors, logger.letter = True, False, False
    logger.module_severity = logger.WARNING
    handler = Handler()
    logger.python_logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.python_logger.removeHandler(handler)


def _parser_error(parser: Any, graph: str, name: str) -> EngineError:
    """Return an error with the first message of the parser. The others often follow from it."""
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split()).rstrip(".")
    operator = error.node_operator()
    node = f" at node {error.node_name()!r} ({operator})" if operator else ""
    return EngineError(f"{name} cannot read {graph}{node}: {text}.", _parser_hint(text, operator))


def _parser_hint(text: str, operator: str) -> str:
    """Return the likely cause of a parser error, and what to do."""
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
    """Fill an empty Polygraphy profile with the ranges of a profile.

    A count that no shape depends on is no shape tensor. It is an input of a fixed shape, and needs no range.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        ranges = wanted.inputs.get(tensor.name)
        if ranges and (tensor.is_shape_tensor or len(tensor.shape) == len(ranges.least)):
            empty.add(tensor.name, ranges.least, ranges.usual, ranges.most)
    return empty


def _build_error(request: Request, name: str, errors: list[str]) -> EngineError:
    text = " ".join(errors[-1].split()).rstrip(".") if errors else "it did not say why"
    hint = "Try smaller limits; if that does not help, report the graph and this message."
    if "workspace" in text.lower():
        hint = "Give a larger --workspace."
    return EngineError(f"{name} could not build {request.graph} for SM{request.sm}: {text}.", hint)


def _set_compute_capability(trt: Any, config: Any, sm: int, name: str) -> None:
    """Make TensorRT-RTX build for a kind of GPU that this machine need not have.

    Polygraphy has no option for this.
    """
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        raise EngineError(f"{name} does not know SM{sm}.", "Update it: pip install -U tensorrt-rtx.")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # needed to capture CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
