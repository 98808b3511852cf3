"""Timing of the graphs of two bundles, which run in turns so that other load on the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from visprune.bundle import Bundle
from visprune.cores import available_memory, usable_cores
from visprune.quantize.output_error import RecordedGraph
from visprune.runtime.backends.ort_cpu import open_cpu
from visprune.runtime.backends.runner import BackendOptions, Runner

__all__ = ["Times", "time_graph"]

_ROUNDS = 7  # timed runs of each graph
# Memory of a loaded graph as a multiple of the bytes of its weights. ONNX Runtime keeps a copy of them in an
# order of its own, and that copy of float16 is float32.
_LOADED = {"float32": 2.0, "float16": 3.0}


@dataclass(frozen=True, slots=True)
class Times:
    """Times of the same run in both bundles.

    Attributes:
        before: Median milliseconds in the float bundle.
        after: Median milliseconds in the quantized bundle.
        spread: The larger of the two interquartile ranges, each as a share of its median.
    """

    before: float
    after: float
    spread: float


def time_graph(
    before: Bundle, after: Bundle, graph: str, recorded: RecordedGraph
) -> tuple[Times | None, Times | None]:
    """Time one graph of two bundles on the cores of this machine.

    Args:
        before: The float bundle.
        after: The quantized bundle.
        graph: Name of the graph.
        recorded: The recorded inputs of the graph, with those of at least one sample.

    Returns:
        The times of the first run of a sample, and of a decoding step if the graph runs in one. Both are None
        if the memory cannot hold both graphs.
    """
    available = available_memory()
    if available is not None and _needed(before, graph) + _needed(after, graph) > available:
        return None, None
    options = BackendOptions("cpu", usable_cores())
    with open_cpu(before, graph, options) as one, open_cpu(after, graph, options) as other:
        prefill = _in_turns(one, other, recorded.feeds[0])
        return prefill, (None if recorded.step is None else _in_turns(one, other, recorded.step))


def _in_turns(one: Runner, other: Runner, feeds: Mapping[str, NDArray[Any]]) -> Times:
    """Time two runners on the same inputs, in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(_ROUNDS + 1):
        for runner, times in zip((one, other), taken, strict=True):
            start = time.perf_counter()
            runner.infer(feeds)
            if turn:  # the first run warms up
                times.append((time.perf_counter() - start) * 1e3)
    quartiles = [statistics.quantiles(times, n=4) for times in taken]
    spread = max((high - low) / middle for low, middle, high in quartiles)
    return Times(quartiles[0][1], quartiles[1][1], spread)


def _needed(bundle: Bundle, graph: str) -> float:
    """Return an estimate of the bytes of memory that a loaded graph takes."""
    data = bundle.manifest.graphs[graph].data
    return _LOADED[bundle.manifest.dtype] * bundle.file(data).stat().st_size if data else 0.0
