"""Compare quantized graphs with the float ones they come from, on samples that no range comes from.

The float bundle runs once; what goes into each of its graphs is recorded with what comes out, and with
sampled outputs of its linear layers. Each quantized graph is then fed the same.
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
from visprune.quantize.calibration import Watched, ask, calm, observed, observed_pipeline
from visprune.quantize.linears import find_linears
from visprune.quantize.loading import load_graph
from visprune.quantize.observe import Around, Observation
from visprune.runtime.backends.runner import BackendOptions, Runner, Value, to_numpy
from visprune.runtime.samples import Sample

__all__ = ["Difference", "Recorded", "compare", "outputs_of", "record"]

NEW_TOKENS = 16
_ROWS = 32

Feeds = dict[str, NDArray[Any]]


@dataclass(slots=True)
class Recorded:
    """What a float graph was given and gave.

    Attributes:
        feeds: For each sample, of the prefill or of its first picture.
        outputs: The first output of each of these runs.
        layers: For each, some rows of each linear layer's output.
        step: Feeds of a decoded token, of graphs that see any.
    """

    feeds: list[Feeds] = field(default_factory=list)
    outputs: list[NDArray[Any]] = field(default_factory=list)
    layers: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    step: Feeds | None = None


@dataclass(slots=True)
class Difference:
    """Sums over values of two outputs, from which their relative error and angle follow."""

    squares: float = 0.0
    other_squares: float = 0.0
    products: float = 0.0
    differences: float = 0.0

    def add(self, exact: NDArray[Any], rounded: NDArray[Any]) -> None:
        """Take in two arrays of one shape."""
        a, b = exact.astype(np.float64).ravel(), rounded.astype(np.float64).ravel()
        self.squares += float(a @ a)
        self.other_squares += float(b @ b)
        self.products += float(a @ b)
        self.differences += float((a - b) @ (a - b))

    @property
    def relative_l2(self) -> float:
        """Norm of the difference by that of the exact output."""
        return (self.differences / self.squares) ** 0.5 if self.squares else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the two."""
        norms = (self.squares * self.other_squares) ** 0.5
        return self.products / norms if norms else 1.0


def outputs_of(bundle: Bundle, graph: str) -> dict[str, int]:
    """The values that linear layers of a graph put out, and their widths."""
    linears = find_linears(load_graph(bundle, graph).graph)
    return {str(linear.y.name): linear.shape[1] for linear in linears}


def record(
    bundle: Bundle, samples: Sequence[Sample], watched: Watched, progress: Progress
) -> tuple[dict[str, Recorded], list[tuple[int, ...]]]:
    """Run the float bundle on held-out samples.

    Args:
        bundle: The float bundle.
        samples: Held out.
        watched: Outputs of linear layers, by graph.
        progress: Called as the work goes on.

    Returns:
        What each graph was given and gave, and the greedy tokens of each sample.
    """
    kept: dict[str, Recorded] = {}
    seen: dict[str, Mapping[str, Observation]] = {}

    def wrap(name: str, runner: Runner) -> Runner:
        kept[name] = Recorded()
        return _Recorder(runner, kept[name], lambda: seen.pop(name, {}))

    answers = []
    with observed_pipeline(bundle, watched, _ROWS, seen.__setitem__, wrap) as pipeline:
        for index, sample in enumerate(samples):
            progress("running the float bundle", index, len(samples))
            for one in kept.values():
                one.feeds.append({})  # to be filled by the first run
            made = ask(pipeline, sample, NEW_TOKENS)
            answers.append(tuple(made.token_ids))
    progress("running the float bundle", len(samples), len(samples))
    return kept, answers


def compare(
    bundle: Bundle,
    graph: str,
    recorded: Recorded,
    widths: Mapping[str, int],
    factors: Mapping[str, NDArray[np.float32]],
) -> tuple[GraphError, dict[str, Difference]]:
    """Feed a quantized graph what the float one was fed.

    Args:
        bundle: The quantized bundle, complete but for its hashes.
        graph: Name of the graph.
        recorded: Of the float graph.
        widths: Outputs of its linear layers.
        factors: What some of these were divided by, for each channel.

    Returns:
        The error of its first output, and that of each observed value.
    """
    seen: dict[str, Mapping[str, Observation]] = {}
    total = Difference()
    layers = {name: Difference() for name in widths}
    first = bundle.manifest.graphs[graph].outputs[0].name
    assert bundle.manifest.quantization is not None
    # Integer kernels hold integers; where there are none, weights are mapped, and widened as they are used.
    simulated = "fp8" in bundle.manifest.quantization.precisions(graph)
    options = calm() if simulated else BackendOptions("cpu", usable_cores())
    with observed(bundle, graph, widths, _ROWS, seen.__setitem__, options) as runner:
        for feeds, exact, rows in zip(recorded.feeds, recorded.outputs, recorded.layers, strict=True):
            total.add(exact, to_numpy(runner.infer(feeds)[first]))
            for name, difference in layers.items():
                difference.add(rows[name], seen[graph][name].rows * factors.get(name, 1.0))
    return GraphError(graph, total.relative_l2, total.cosine), layers


class _Recorder(Around):
    """Keeps the first run of each sample, and one decoded token."""

    def __init__(
        self, inner: Runner, kept: Recorded, observations: Callable[[], Mapping[str, Observation]]
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
