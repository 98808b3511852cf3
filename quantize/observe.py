"""Observation of values inside a graph while it runs.

A copy of the graph gets additional, small outputs. For a value [..., K] they are the largest magnitude of
each channel, the sum of the magnitudes of each channel, and some rows. The rows are evenly spaced ones, and
always the first and the last, because these tokens are unlike the others: the first token of a model often
has by far the largest activations, and the answer follows the last. So memory does not grow with the length
of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.runtime.backends.runner import Runner, Specs, Value, to_numpy

__all__ = ["ObservedValue", "Observer", "RunnerWrapper", "Sink", "add_observations"]

Array = NDArray[np.float32]

_PREFIX = "observed"  # of the names of added values


@dataclass(frozen=True, slots=True)
class ObservedValue:
    """One value [..., K] as observed in one run of its graph.

    Attributes:
        amax: Largest magnitude of each channel, [K].
        total: Sum of the magnitudes of each channel, [K].
        count: Number of rows of the value.
        rows: Sampled rows, [R, K].
    """

    amax: Array
    total: Array
    count: int
    rows: Array


Sink = Callable[[str, Mapping[str, ObservedValue]], None]
"""Called after each run with the name of the graph and its observed values, by their names."""


def add_observations(model: ir.Model, widths: Mapping[str, int], most_rows: int) -> None:
    """Add outputs to a model that describe some of its values; see the module's docstring.

    Args:
        model: The model; it is changed.
        widths: The values to observe, with the number of channels K of each.
        most_rows: About how many rows of each value are sampled in one run; they may be up to twice as many.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    nodes: list[ir.Node] = []

    def constant(name: str, array: NDArray[Any]) -> ir.Value:
        value = ir.Value(
            name=f"{_PREFIX}.{name}",
            const_value=ir.tensor(array, name=f"{_PREFIX}.{name}"),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        graph.register_initializer(value)
        return value

    def make(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or None)
        nodes.append(node)
        return node.outputs[0]

    zero, one = constant("zero", np.array([0])), constant("one", np.array([1]))
    minus = constant("minus", np.array([-1]))
    two, end = constant("two", np.array([2])), constant("end", np.array([2**62]))
    most, flat = constant("most", np.array([most_rows])), {}
    for name, width in widths.items():
        value = values[name]
        if width not in flat:
            flat[width] = constant(f"flat.{width}", np.array([-1, width]))
        rows = make("Reshape", make("Cast", value, to=ir.DataType.FLOAT.value), flat[width])  # [R, K]
        size = make("Abs", rows)
        count = make("Shape", rows, start=0, end=1)
        step = make("Max", make("Div", count, most), one)
        first = make("Slice", rows, zero, one, zero)
        last = make("Slice", rows, minus, end, zero)
        spaced = make("Slice", rows, make("Add", make("Div", step, two), one), end, zero, step)
        outputs = {
            "amax": make("ReduceMax", size, zero, keepdims=0),
            "total": make("ReduceSum", size, zero, keepdims=0),
            "count": count,
            "rows": make("Concat", first, spaced, last, axis=0),
        }
        for what, output in outputs.items():
            output.name = f"{_PREFIX}.{what}.{name}"
            output.type = ir.TensorType(ir.DataType.INT64 if what == "count" else ir.DataType.FLOAT)
            graph.outputs.append(output)
    graph.extend(nodes)


class RunnerWrapper:
    """A runner that delegates to another one. Subclasses add to `infer`.

    Args:
        inner: The runner to delegate to.
    """

    def __init__(self, inner: Runner) -> None:
        self.inner = inner

    @property
    def specs(self) -> Specs:
        """Inputs and outputs of the graph."""
        return self.inner.specs

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`."""
        return self.inner.infer(feeds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.__exit__(kind, error, trace)


class Observer(RunnerWrapper):
    """A runner that passes the observed values of each run to a sink, and returns the graph's own outputs.

    Args:
        inner: A runner of the model that `add_observations` changed.
        graph: Name of the graph in the bundle.
        names: The observed values.
        sink: Called after each run.
    """

    def __init__(self, inner: Runner, graph: str, names: Collection[str], sink: Sink) -> None:
        super().__init__(inner)
        self._graph, self._names, self._sink = graph, names, sink

    @property
    def specs(self) -> Specs:
        """Inputs and outputs of the graph as it is in the bundle, without the added outputs."""
        specs = self.inner.specs
        own = tuple(spec for spec in specs.outputs if not spec.name.startswith(f"{_PREFIX}."))
        return Specs(specs.inputs, own)

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`."""
        outputs = self.inner.infer(feeds)
        seen = {}
        for name in self._names:
            amax, total, count, rows = (
                to_numpy(outputs.pop(f"{_PREFIX}.{what}.{name}"))
                for what in ("amax", "total", "count", "rows")
            )
            seen[name] = ObservedValue(amax, total, int(count[0]), rows)
        self._sink(self._graph, seen)
        return outputs
