"""The report of a quantization, `quantization.json` in the bundle, and its verdict in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from visprune.quantize.timing import Times

__all__ = ["REPORT", "Answers", "GraphReport", "LayerReport", "Report"]

REPORT = "quantization.json"

# Percentage points of exact match that a bundle may lose and still be worth it: 1 with 8 bits, 2 with int4.
_POINTS = {"int4": 2.0}
_MOST_POINTS = 1.0
_NOTICEABLE = 1.05  # a speedup below this is not worth mentioning


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The report of one linear layer.

    Attributes:
        graph: Name of the graph that it is in.
        layer: Name of the layer.
        precision: Its precision; "float" if it was left float.
        own_error: Relative error of its output when only this layer is rounded, on calibration samples.
        relative_l2: Relative error of its output in the quantized graph, on held-out samples. It includes the
            errors of the layers before it.
        cosine: Cosine between its output in the quantized graph and in the float graph, on the same samples.
        note: Why it was left float, if it was.
    """

    graph: str
    layer: str
    precision: str
    own_error: float | None
    relative_l2: float | None
    cosine: float | None
    note: str


@dataclass(frozen=True, slots=True)
class GraphReport:
    """The report of one graph.

    Attributes:
        graph: Name of the graph.
        precision: The precisions of its layers.
        relative_l2: Relative error of its output on held-out samples; None if not measured.
        cosine: Cosine between its output and the float graph's, likewise.
        bytes: Bytes of the graph and its weights, float and quantized.
        prefill: Times of the first run of a sample; None if not measured.
        step: Times of a decoding step; None if not measured, or if the graph does not run in one.
    """

    graph: str
    precision: str
    relative_l2: float | None
    cosine: float | None
    bytes: tuple[int, int]
    prefill: Times | None
    step: Times | None


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy answers of both bundles.

    Attributes:
        samples: Number of held-out samples.
        same: Number of samples that both bundles answer with the same tokens.
        questions: Number of questions with a known answer; 0 if there are none.
        right: Questions answered right by the float bundle, and by the quantized one.
    """

    samples: int
    same: int
    questions: int = 0
    right: tuple[int, int] = (0, 0)

    @property
    def points(self) -> float | None:
        """Percentage points of exact match that were gained; negative if they were lost."""
        return 100.0 * (self.right[1] - self.right[0]) / self.questions if self.questions else None


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report of a quantization.

    Attributes:
        parts: Precision of each part.
        samples: Number of samples that ranges come from.
        held_out: Number of samples that errors were measured on.
        skipped: Lines of the calibration file that were left out, each with its reason.
        machine: Processor and threads that times were measured on.
        graphs: The report of each graph.
        layers: The report of each linear layer of the graphs that were quantized.
        answers: Comparison of answers; None if no answers were compared.
    """

    parts: dict[str, str]
    samples: int
    held_out: int
    skipped: tuple[str, ...]
    machine: str
    graphs: tuple[GraphReport, ...]
    layers: tuple[LayerReport, ...]
    answers: Answers | None

    def to_json(self) -> str:
        """Return the text of `quantization.json`."""
        return json.dumps({**asdict(self), "verdict": self.verdict()}, indent=2) + "\n"

    def speedup(self, what: Literal["prefill", "step"]) -> float | None:
        """Return how many times faster all graphs together are.

        Returns:
            The ratio of the times, 1 if the difference is within the spread of the measurements, or None if
            not all graphs were timed.
        """
        times = [graph.prefill if what == "prefill" else graph.step for graph in self.graphs]
        known = [one for one in times if one is not None]
        if not known or (what == "prefill" and len(known) < len(times)):
            return None
        before, after = sum(one.before for one in known), sum(one.after for one in known)
        noise = sum(one.spread * max(one.before, one.after) for one in known) / max(before, after)
        return 1.0 if 1 / (1 + noise) < before / after < 1 + noise else before / after

    def verdict(self) -> str:
        """Return one line: how much faster, how much worse, and whether to keep the bundle."""
        first, step = self.speedup("prefill"), self.speedup("step")
        points = self.answers.points if self.answers else None
        errors = [graph.relative_l2 for graph in self.graphs if graph.relative_l2]
        sizes = [sum(graph.bytes[side] for graph in self.graphs) for side in (0, 1)]
        said = []
        said += ["times not measured"] if first is None else [f"first token {_times(first)}"]
        said += [] if step is None else [f"each further token {_times(step)}"]
        said += [f"{100 * sizes[1] / sizes[0]:.0f}% of the bytes"]
        said += [f"output error at most {100 * max(errors):.2g}%"] if errors else []
        said += [] if points is None else [_points(points)]
        names = " + ".join(dict.fromkeys(p for p in self.parts.values() if p != "float"))
        return f"{names}: {', '.join(said)}: {self._judgement(first, step, points)}"

    def _judgement(self, first: float | None, step: float | None, points: float | None) -> str:
        allowed = max(_POINTS.get(precision, _MOST_POINTS) for precision in self.parts.values())
        if points is not None and points < -allowed:
            return f"not worth it, the limit is {allowed:g}"
        known = [speed for speed in (first, step) if speed is not None]
        if not known:
            return "smaller; measure it where it will run"
        if max(known) < _NOTICEABLE:
            return "not faster here; keep it only for its size"
        if min(known) < 1 / _NOTICEABLE:
            slower = "the first token" if first == min(known) else "decoding"
            return f"keep it where {slower} matters less than the rest"
        return "keep it"


def _times(speedup: float) -> str:
    if speedup == 1.0:
        return "as fast, as far as can be told"
    return f"{speedup:.2g}x faster" if speedup >= 1.0 else f"{1 / speedup:.2g}x slower"


def _points(points: float) -> str:
    if abs(points) < 0.05:
        return "as many right answers"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'fewer'} right answers"
