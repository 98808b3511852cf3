"""ONNX Runtime: what sessions on the CPU and on a GPU have in common.

Outputs are bound to the device and passed on as `OrtValue`s, so the values between graphs, above all the
cache, are neither copied nor read by Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any, TypeAlias

import numpy as np

from visprune.bundle import Bundle
from visprune.cores import sums_may_overflow
from visprune.errors import BundleError, MemoryShortageError, UnsupportedError
from visprune.manifest import TensorSpec
from visprune.runtime.backends.runner import BackendOptions, Runner, Specs, Value

__all__ = [
    "CPU",
    "CUDA",
    "OrtRunner",
    "Provider",
    "check_specs",
    "open_graph",
    "open_session",
    "session_options",
    "settings_for",
]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

Provider: TypeAlias = tuple[str, dict[str, str]]
"""Name of an execution provider of ONNX Runtime, and its options."""

_SPIN_US = "200"  # ONNX Runtime before 1.26 does not know the setting

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
}


def settings_for(
    ort: ModuleType, bundle: Bundle, graph: str, options: BackendOptions, *, gpu: bool = False
) -> Any:
    """Return the `SessionOptions` of a graph."""
    settings = session_options(ort, options, gpu=gpu)
    quantization = bundle.manifest.quantization
    if quantization is not None and "fp8" in quantization.precisions(graph):
        # ONNX Runtime's optimizer for Q/DQ nodes treats every 8-bit number as an integer.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def open_graph(
    ort: ModuleType, bundle: Bundle, graph: str, settings: Any, providers: list[Provider]
) -> OrtRunner:
    """Load a graph of a bundle.

    Args:
        ort: The module `onnxruntime`.
        bundle: The bundle.
        graph: Name of the graph.
        settings: Session options, from `settings_for`.
        providers: Execution providers, in the order in which parts of the graph are offered to them; empty if
            the settings name the provider.

    Raises:
        BundleError: ONNX Runtime cannot read the graph, or the graph differs from the manifest.
        UnsupportedError: There is not enough memory.
    """
    path = bundle.file(bundle.manifest.graphs[graph].file)
    runner = OrtRunner(ort, open_session(ort, str(path), settings, providers, graph), graph)
    check_specs(bundle, graph, runner.specs)
    return runner


def session_options(ort: ModuleType, options: BackendOptions, *, gpu: bool) -> Any:
    """Return the `SessionOptions` of any graph."""
    settings = ort.SessionOptions()
    # Errors are raised as exceptions. Only the reason why CUDA did not start is logged instead.
    settings.log_severity_level = 3 if gpu else 4
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if gpu:  # keeps weights out of the memory arena, which grows by doubling
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if options.low_memory:
        _keep_weights_on_disk(ort, settings)
    # Each graph has its own thread pool. Between runs its threads must not spin while another graph runs, and
    # during a run not for longer than it takes to wake them: another thread may need the core.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    if sums_may_overflow():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    # A memory pattern is stored for each new set of shapes, and decoding has new shapes at every token.
    settings.enable_mem_pattern = False
    # An arena keeps the activations of the largest run, for each graph. Without it the graphs use the memory
    # of one another: the prefill that of the vision encoder.
    settings.enable_cpu_mem_arena = gpu
    return settings


def open_session(
    ort: ModuleType, model: str | bytes, settings: Any, providers: list[Provider], graph: str
) -> Any:
    """Return the `InferenceSession` of a model, which is a file or serialized.

    Raises:
        BundleError: ONNX Runtime cannot read the model.
        UnsupportedError: There is not enough memory, or ONNX Runtime is too old.
    """
    _check_version(ort)
    try:
        # No fallback: it prints on stdout, and tries other providers than the requested ones.
        return ort.InferenceSession(model, settings, providers=providers or None, enable_fallback=0)
    except Exception as error:  # the package's exceptions have no common base of their own
        text = _first_line(error)
        if _out_of_memory(error):
            raise _no_memory(graph) from None
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load the graph {graph!r}: {text}",
            "Update ONNX Runtime, or export the model again.",
        ) from None


def _check_version(ort: ModuleType) -> None:
    """Refuse old versions: 1.23.0 computes grouped-query attention wrongly, without an error.

    Raises:
        UnsupportedError: ONNX Runtime is older than 1.23.1.
    """
    if tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:3]) < (1, 23, 1):
        raise UnsupportedError(
            f"ONNX Runtime {ort.__version__} is too old: 1.23.0 computes grouped-query attention wrongly.",
            "Install 1.23.1 or newer: pip install -U onnxruntime.",
        )


def _keep_weights_on_disk(ort: ModuleType, settings: Any) -> None:
    """Use weights from their memory-mapped file, whose pages the system can drop from memory again.

    The CPU has few kernels for float16, so weights are cast to float32. Above the basic optimization level
    the casts are done once when the graph is loaded, and the results take twice the size of the model. At the
    basic level each cast stays a node. The default execution order runs all casts early. The priority-based
    order runs each cast right before its result is used, so that the next cast can reuse the memory.
    """
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.add_session_config_entry("session.disable_prepacking", "1")  # prepacking copies float32 weights


def check_specs(bundle: Bundle, graph: str, specs: Specs) -> None:
    """Refuse a file whose interface differs from the manifest, from which inputs are made.

    Raises:
        BundleError: It differs.
    """
    told = bundle.manifest.graphs[graph]
    for kind, ours, theirs in (("input", told.inputs, specs.inputs), ("output", told.outputs, specs.outputs)):
        in_file = {spec.name: spec for spec in theirs}
        if odd := in_file.keys() ^ {spec.name for spec in ours}:
            raise _interface_error(graph, kind, min(odd), "is in only one of them")
        for spec in ours:
            actual = in_file[spec.name]
            if actual.dtype != spec.dtype or _fixed_dims(actual) != _fixed_dims(spec):
                what = f"is {actual.dtype} {list(actual.shape)}, not {spec.dtype} {list(spec.shape)}"
                raise _interface_error(graph, kind, spec.name, what)


def _fixed_dims(spec: TensorSpec) -> list[int | None]:
    """Return the shape with None for symbolic dimensions, whose names a tool may change."""
    return [dim if isinstance(dim, int) else None for dim in spec.shape]


def _interface_error(graph: str, kind: str, tensor: str, what: str) -> BundleError:
    return BundleError(
        f"The file of the graph {graph!r} does not fit the manifest: the {kind} {tensor!r} {what}.",
        "Copy the bundle again, or export again.",
    )


class OrtRunner:
    """One session with I/O binding.

    Args:
        ort: The module `onnxruntime`.
        session: The `InferenceSession`.
        graph: Name for messages.
    """

    def __init__(self, ort: ModuleType, session: Any, graph: str) -> None:
        self._ort = ort
        self._session = session
        self._graph = graph
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        self._device = "cpu" if self.providers == (CPU,) else "cuda"
        self._specs = Specs(
            tuple(_tensor_spec(node) for node in session.get_inputs()),
            tuple(_tensor_spec(node) for node in session.get_outputs()),
        )

    @property
    def specs(self) -> Specs:
        """Inputs and outputs."""
        return self._specs

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`. Contiguous host arrays are bound without a copy.

        Raises:
            UnsupportedError: There is not enough memory.
            BundleError: The graph fails on inputs made by the manifest's numbers.
        """
        try:
            return self._run(feeds)
        except Exception as error:  # the package's exceptions have no common base of their own
            if _out_of_memory(error):
                raise _no_memory(self._graph) from None
            raise BundleError(
                f"ONNX Runtime {self._ort.__version__} cannot run the graph {self._graph!r}: "
                f"{_first_line(error)}",
                "The manifest has other numbers than the graphs were made for, such as the context length: "
                "copy the bundle again, or export the model again.",
            ) from error

    def _run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        binding = self._session.io_binding()
        inputs = {name: self._on_device(value) for name, value in feeds.items()}  # alive during the run
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        names = [spec.name for spec in self._specs.outputs]
        for name in names:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _on_device(self, value: Value) -> Any:
        """Return a value as an `OrtValue`. It uses a host array's memory and holds a reference to it."""
        if isinstance(value, np.ndarray):
            return self._ort.OrtValue.ortvalue_from_numpy(_contiguous(value))
        return value

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


def _contiguous(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.flags.c_contiguous else array.copy()  # ascontiguousarray makes a scalar 1-d


def _tensor_spec(node: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in node.shape)
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), shape)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line.rstrip(".") + "."


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    phrases = ("failed to allocate memory", "bad_alloc", "out of memory")  # the last is CUDA's
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


def _no_memory(graph: str) -> MemoryShortageError:
    return MemoryShortageError(
        f"There is not enough memory for the graph {graph!r}.",
        "Keep fewer visual tokens, shorten the prompt, or use a smaller model or a narrower dtype.",
    )
