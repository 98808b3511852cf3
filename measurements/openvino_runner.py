"""OpenVINO's runtime as a backend of visprune, to measure it on the graphs of a bundle.

It needs the package openvino, which visprune itself does not use. Float graphs run in bfloat16 where the
processor has it, which is OpenVINO's own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.bundle import Bundle
from visprune.runtime.backends.runner import BackendOptions, Runner, Specs, Value, to_numpy

__all__ = ["open_openvino"]


def open_openvino(bundle: Bundle, graph: str, options: BackendOptions) -> Runner:
    """Compile a graph for the CPU."""
    import openvino

    told = bundle.manifest.graphs[graph]
    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.threads}
    compiled = core.compile_model(core.read_model(bundle.file(told.file)), "CPU", settings)
    return _OpenVinoRunner(compiled, Specs(told.inputs, told.outputs))


class _Output:
    """An output in OpenVINO's memory, which the next call but one overwrites."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def numpy(self) -> NDArray[Any]:
        return np.array(self.tensor.data)


class _OpenVinoRunner:
    """A compiled graph with two requests in turns, so that the outputs of one can be inputs of the other."""

    def __init__(self, compiled: Any, specs: Specs) -> None:
        self._requests = cycle([compiled.create_infer_request() for _ in range(2)])
        self._specs = specs

    @property
    def specs(self) -> Specs:
        return self._specs

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        import openvino

        request = next(self._requests)
        for name, value in feeds.items():
            tensor = value.tensor if isinstance(value, _Output) else openvino.Tensor(to_numpy(value))
            request.set_tensor(name, tensor)
        request.infer()
        return {spec.name: _Output(request.get_tensor(spec.name)) for spec in self._specs.outputs}

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
