"""ONNX Runtime: sessions on the CPU, and what those on a GPU have in common with them.

Outputs are bound to the device and handed on as `OrtValue`s, so what flows between graphs, the cache
above all, is neither copied nor seen by Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeAlias

import numpy as np

from visprune.bundle import Bundle
from visprune.cores import sums_may_overflow
from visprune.errors import BundleError, UnsupportedError
from visprune.manifest import TensorSpec
from visprune.optional import require
from visprune.runtime.backends.runner import BackendOptions, Runner, Specs, Value

__all__ = ["CPU", "CUDA", "OrtRunner", "Provider", "open_cpu", "open_graph", "open_model", "settings_for"]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

Provider: TypeAlias = tuple[str, dict[str, str]]
"""A name of ONNX Runtime's own, and options."""

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


def open_cpu(bundle: Bundle, graph: str, options: BackendOptions) -> OrtRunner:
    """Load a graph on the CPU.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: It cannot read the graph, or the graph is not as the manifest tells.
    """
    ort = require("onnxruntime", extra="cpu")
    settings = settings_for(ort, bundle, graph, options)
    return open_graph(ort, bundle, graph, settings, [(CPU, {})])


def open_model(model: bytes, folder: Path, graph: str, options: BackendOptions) -> OrtRunner:
    """Load a model on the CPU that is no file of a bundle.

    Args:
        model: A serialized ONNX model.
        folder: Where its external data lies.
        graph: Name for messages.
        options: As for a graph of a bundle.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: It cannot read the model.
        UnsupportedError: There is not enough memory.
    """
    ort = require("onnxruntime", extra="cpu")
    settings = _session_options(ort, options, gpu=False)
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return OrtRunner(ort, _session(ort, model, settings, [(CPU, {})], graph), graph)


def settings_for(
    ort: ModuleType, bundle: Bundle, graph: str, options: BackendOptions, *, gpu: bool = False
) -> Any:
    """The `SessionOptions` of a graph."""
    settings = _session_options(ort, options, gpu=gpu)
    quantization = bundle.manifest.quantization
    if quantization is not None and "fp8" in quantization.precisions(graph):
        # Its optimizer takes every 8-bit number for an integer.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def open_graph(
    ort: ModuleType, bundle: Bundle, graph: str, settings: Any, providers: list[Provider]
) -> OrtRunner:
    """Load a graph of a bundle.

    Args:
        ort: The module.
        bundle: Its bundle.
        graph: Its name.
        settings: From `settings_for`.
        providers: In the order in which parts of the graph are offered; empty where the settings tell.

    Raises:
        BundleError: ONNX Runtime cannot read the graph, or the graph is not as the manifest tells.
        UnsupportedError: There is not enough memory.
    """
    path = bundle.file(bundle.manifest.graphs[graph].file)
    runner = OrtRunner(ort, _session(ort, str(path), settings, providers, graph), graph)
    _check_specs(bundle, graph, runner.specs)
    return runner


def _session_options(ort: ModuleType, options: BackendOptions, *, gpu: bool) -> Any:
    settings = ort.SessionOptions()
    # Errors come as exceptions, except why CUDA did not start, which is only logged.
    settings.log_severity_level = 3 if gpu else 4
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if gpu:  # weights go around the arena, which grows by doubling
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if options.low_memory:
        _keep_weights_on_disk(ort, settings)
    # Each graph has its own pool of threads. Between two runs they must not spin against another graph's.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if sums_may_overflow():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    # A pattern is kept for each new set of shapes, and decoding has a new one at every token.
    settings.enable_mem_pattern = False
    return settings


def _session(
    ort: ModuleType, model: str | bytes, settings: Any, providers: list[Provider], graph: str
) -> Any:
    _check_version(ort)
    try:
        # Without the fallback, which prints on stdout and tries other providers than those asked for.
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
    """Refuse versions of which one computes grouped-query attention wrongly, without a word.

    Raises:
        UnsupportedError: It is older than 1.23.1.
    """
    if tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:3]) < (1, 23, 1):
        raise UnsupportedError(
            f"ONNX Runtime {ort.__version__} is too old: 1.23.0 computes grouped-query attention wrongly.",
            "Install 1.23.1 or newer: pip install -U onnxruntime.",
        )


def _keep_weights_on_disk(ort: ModuleType, settings: Any) -> None:
    """Use weights where they are mapped from their file, which the system may take out of memory again.

    The CPU has few kernels for float16, so weights are cast to float32. Above the basic level that is done
    once and kept, in twice the size of the model; on it each cast is a node. The default order of nodes runs
    all of these early; by priority each comes right before it is used, and its memory is the next one's.
    """
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.add_session_config_entry("session.disable_prepacking", "1")  # it copies float32 weights


def _check_specs(bundle: Bundle, graph: str, specs: Specs) -> None:
    """The file has the interface that the manifest tells of it; what is fed is made by the manifest's."""
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
    """The shape without the names of its symbolic dimensions, which a tool may change."""
    return [dim if isinstance(dim, int) else None for dim in spec.shape]


def _interface_error(graph: str, kind: str, tensor: str, what: str) -> BundleError:
    return BundleError(
        f"The file of the graph {graph!r} does not fit the manifest: the {kind} {tensor!r} {what}.",
        "Copy the bundle again, or export again.",
    )


class OrtRunner:
    """One session with I/O binding.

    Args:
        ort: The module.
        session: Its `InferenceSession`.
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
        """Run the graph; see `Runner.infer`. Host arrays are bound where they lie if they are contiguous.

        Raises:
            UnsupportedError: There is not enough memory.
            BundleError: The graph does not take what the manifest's numbers lead to.
        """
        try:
            return self._run(feeds)
        except Exception as error:  # the package's exceptions have no common base of their own
            if _out_of_memory(error):
                raise _no_memory(self._graph) from None
            raise BundleError(
                f"ONNX Runtime {self._ort.__version__} cannot run the graph {self._graph!r}: "
                f"{_first_line(error)}",
                "The bundle says other numbers than its graphs were made for, such as its context length: "
                "copy it again, or export the model again.",
            ) from error

    def _run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            # The OrtValue points into the array and holds a reference to it; the binding copies to a GPU.
            bound = (
                self._ort.OrtValue.ortvalue_from_numpy(_contiguous(value))
                if isinstance(value, np.ndarray)
                else value
            )
            binding.bind_ortvalue_input(name, bound)
        names = [spec.name for spec in self._specs.outputs]
        for name in names:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


def _contiguous(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.flags.c_contiguous else array.copy()  # ascontiguousarray would make a scalar 1-d


def _tensor_spec(node: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in node.shape)
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), shape)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line.rstrip(".") + "."


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    said = ("failed to allocate memory", "bad_alloc", "out of memory")  # the last by CUDA
    return isinstance(error, MemoryError) or any(words in text for words in said)


def _no_memory(graph: str) -> UnsupportedError:
    return UnsupportedError(
        f"There is not enough memory for the graph {graph!r}.",
        "Keep fewer visual tokens, shorten the prompt, or take a smaller model or a narrower dtype.",
    )
