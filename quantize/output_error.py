"""The error of quantized graphs against the float graphs, on held-out samples.

The float bundle runs once. The inputs and outputs of each of its graphs are recorded, with sampled outputs of
its linear layers. Each quantized graph then gets the same inputs. No range comes from these samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.bundle import Bundle
from visprune.cores import usable_cores
from visprune.manifest import GraphError
from visprune.progress import Progress
from visprune.quantize.bundle_graphs import load_graph
from visprune.quantize.calibration import (
    ValueWidths,
    answer_sample,
    low_memory_options,
    observed_graph,
    observed_pipeline,
)
from visprune.quantize.linears import find_linears
from visprune.quantize.observe import ObservedValue, RunnerWrapper
from visprune.runtime.backends.runner import BackendOptions, Runner, Value, to_numpy
from visprune.runtime.samples import Sample

__all__ = ["OutputError", "RecordedGraph", "compare", "output_widths", "record"]

COMPARED_TOKENS = 16
"""Tokens generated for each held-out sample, by both bundles."""

_ROWS = 32  # rows sampled of each linear layer's output in one run

Feeds = dict[str, NDArray[Any]]


@dataclass(slots=True)
class RecordedGraph:
    """Recorded inputs and outputs of a float graph.

    Attributes:
        feeds: For each sample, the inputs of the first run: of the prefill, or of the first image.
        outputs: The graph's first output in each of these runs.
        layers: For each of these runs, sampled rows of each linear layer's output, [R, N].
        step: Inputs of a decoding step; None if the graph does not run in one.
    """

    feeds: list[Feeds] = field(default_factory=list)
    outputs: list[NDArray[Any]] = field(default_factory=list)
    layers: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    step: Feeds | None = None


@dataclass(slots=True)
class OutputError:
    """Sums over the values of exact and rounded outputs, for their relative error and their cosine."""

    squares: float = 0.0
    other_squares: float = 0.0
    products: float = 0.0
    differences: float = 0.0

    def add(self, exact: NDArray[Any], rounded: NDArray[Any]) -> None:
        """Add an exact output and a rounded one, of the same shape."""
        a, b = exact.astype(np.float64).ravel(), rounded.astype(np.float64).ravel()
        self.squares += float(a @ a)
        self.other_squares += float(b @ b)
        self.products += float(a @ b)
        self.differences += float((a - b) @ (a - b))

    @property
    def relative_l2(self) -> float:
        """Norm of the difference, divided by the norm of the exact output."""
        return (self.differences / self.squares) ** 0.5 if self.squares else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both outputs."""
        norms = (self.squares * self.other_squares) ** 0.5
        return self.products / norms if norms else 1.0


def output_widths(bundle: Bundle, graph: str) -> dict[str, int]:
    """Return the names of the outputs of a graph's linear layers, with the number of channels of each."""
    linears = find_linears(load_graph(bundle, graph).graph)
    return {str(linear.y.name): linear.shape[1] for linear in linears}


def record(
    bundle: Bundle, samples: Sequence[Sample], widths: ValueWidths, progress: Progress
) -> tuple[dict[str, RecordedGraph], list[tuple[int, ...]]]:
    """Run the float bundle on held-out samples.

    Args:
        bundle: The float bundle.
        samples: The held-out samples.
        widths: Outputs of linear layers, by graph.
        progress: Called as the work goes on.

    Returns:
        The recorded graphs by their names, and the greedy tokens of each sample.
    """
    kept: dict[str, RecordedGraph] = {}
    seen: dict[str, Mapping[str, ObservedValue]] = {}

    def wrap(name: str, runner: Runner) -> Runner:
        kept[name] = RecordedGraph()
        return _Recorder(runner, kept[name], lambda: seen.pop(name, {}))

    answers = []
    with observed_pipeline(bundle, widths, _ROWS, seen.__setitem__, wrap) as pipeline:
        for index, sample in enumerate(samples):
            progress("running the float bundle", index, len(samples))
            for one in kept.values():
                one.feeds.append({})  # the first run fills it
            made = answer_sample(pipeline, sample, COMPARED_TOKENS)
            answers.append(tuple(made.token_ids))
    progress("running the float bundle", len(samples), len(samples))
    return kept, answers


def compare(
    bundle: Bundle,
    graph: str,
    recorded: RecordedGraph,
    widths: Mapping[str, int],
    factors: Mapping[str, NDArray[np.float32]],
) -> tuple[GraphError, dict[str, OutputError]]:
    """Run a quantized graph on the recorded inputs of the float one, and compare the outputs.

    Args:
        bundle: The quantized bundle, complete but for its hashes.
        graph: Name of the graph.
        recorded: The recorded float graph.
        widths: Outputs of its linear layers.
        factors: For some of these outputs, the factors that their channels are divided by in the quantized
            graph, [N].

    Returns:
        The error of the graph's first output, and the error of each linear layer's output.
    """
    seen: dict[str, Mapping[str, ObservedValue]] = {}
    total = OutputError()
    layers = {name: OutputError() for name in widths}
    first = bundle.manifest.graphs[graph].outputs[0].name
    assert bundle.manifest.quantization is not None
    # Integer kernels keep weights as integers. On a CPU, fp8 has no such kernel: its weights are mapped, and
    # converted to floats when they are used.
    simulated = "fp8" in bundle.manifest.quantization.precisions(graph)
    options = low_memory_options() if simulated else BackendOptions("cpu", usable_cores())
    with observed_graph(bundle, graph, widths, _ROWS, seen.__setitem__, options) as runner:
        for feeds, exact, rows in zip(recorded.feeds, recorded.outputs, recorded.layers, strict=True):
            total.add(exact, to_numpy(runner.infer(feeds)[first]))
            for name, error in layers.items():
                error.add(rows[name], seen[graph][name].rows * factors.get(name, 1.0))
    return GraphError(graph, total.relative_l2, total.cosine), layers


class _Recorder(RunnerWrapper):
    """A runner that records the first run of each sample, and the inputs of one decoding step."""

    def __init__(
        self, inner: Runner, kept: RecordedGraph, observations: Callable[[], Mapping[str, ObservedValue]]
    ) -> None:
        super().__init__(inner)
        self._kept, self._observations = kept, observations

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`."""
        outputs = self.inner.infer(feeds)
        rows = {name: one.rows for name, one in self._observations().items()}
        if not self._kept.feeds[-1]:
            self._kept.feeds[-1] = _copied(feeds)
            self._kept.outputs.append(to_numpy(outputs[self.specs.outputs[0].name]).copy())
            self._kept.layers.append(rows)
        elif self._kept.step is None:
            self._kept.step = _copied(feeds)
        return outputs


def _copied(feeds: Mapping[str, Value]) -> Feeds:
    return {name: to_numpy(value).copy() for name, value in feeds.items()}
