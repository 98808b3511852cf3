"""The work of a quantization: calibrate, decide, write, compare, report.

Graphs are loaded one at a time, their weights mapped. Files that do not change are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from visprune.bundle import Bundle
from visprune.cores import usable_cores
from visprune.manifest import MANIFEST, FileRecord, Graph, Quantization
from visprune.progress import Progress
from visprune.quantize.calibration import Statistics, calibrate
from visprune.quantize.layer_choices import GraphPlan, plan_graph
from visprune.quantize.linears import find_linears, part_of
from visprune.quantize.loading import load_graph
from visprune.quantize.outcome import (
    Judge,
    Written,
    compare_answers,
    graph_reports,
    layer_reports,
    processor,
    seal,
)
from visprune.quantize.output_error import Recorded, compare, outputs_of, record
from visprune.quantize.quantize_options import FLOAT, QuantizeOptions, Settings
from visprune.quantize.quantized_graph import quantize_embedding, write_quantized
from visprune.quantize.search import leave_out
from visprune.quantize.verdict import REPORT, Report
from visprune.runtime.samples import Sample, Samples

__all__ = ["Job"]

# Of the samples one in so many is held out; errors are measured on at most so many.
_HELD_OUT, _MOST_HELD_OUT = 4, 8


@dataclass(frozen=True, slots=True)
class Job:
    """All decisions made but for those that samples make; see `quantize`."""

    source: Bundle
    settings: Settings
    options: QuantizeOptions
    samples: Samples
    progress: Progress

    def write(self, folder: Path, judge: Judge | None) -> None:
        """Write a complete bundle into an empty folder."""
        calibration, held_out = _split(self.samples.usable)
        ranged = calibration if self.settings.uses_samples else []
        statistics = self._calibrate(ranged) if ranged else {}
        plans = {name: self._plan(name, statistics) for name in self.source.manifest.graphs}
        plans = {name: found for name, found in plans.items() if found}
        del statistics  # they may be large
        widths = {name: outputs_of(self.source, name) for name in plans}
        recorded: dict[str, Recorded] = {}
        answers: list[tuple[int, ...]] = []
        if held_out:
            recorded, answers = record(self.source, held_out, widths, self.progress)
        self._copy(folder, set(plans))
        written = {}
        for index, name in enumerate(plans):
            self.progress("quantizing", index, len(plans))
            written[name] = self._quantize(folder, name, plans[name], widths[name], recorded.get(name))
        graphs = {**self.source.manifest.graphs, **{name: one.graph for name, one in written.items()}}
        if self.settings.parts["embedding"] != FLOAT:
            graphs["embedding"] = quantize_embedding(
                self._load("embedding"), self.settings, folder, graphs["embedding"]
            )
        self.progress("quantizing", len(plans), len(plans))
        made = self._made(folder, graphs)
        report = Report(
            parts=self.settings.parts,
            samples=len(ranged),
            held_out=len(held_out),
            skipped=self.samples.skipped,
            machine=f"{processor()}, {usable_cores()} threads",
            graphs=tuple(
                graph_reports(
                    self.source,
                    made,
                    written,
                    recorded if self.options.timing else {},
                    self.settings.parts["embedding"],
                    self.progress,
                )
            ),
            layers=tuple(layer_reports(written)),
            answers=None,
        )
        records: dict[str, FileRecord] = {}
        seal(made, report, records)
        if held_out or judge is not None:
            found = compare_answers(self.source, folder, held_out, answers, judge, self.progress)
            report = replace(report, answers=found)
            seal(made, report, records)

    def _made(self, folder: Path, graphs: dict[str, Graph]) -> Bundle:
        """The new bundle as far as it is known, for graphs to be opened."""
        known = Quantization(self.settings.parts, 0, (), (), REPORT)
        return Bundle(folder, replace(self.source.manifest, graphs=graphs, quantization=known))

    def _load(self, name: str) -> ir.Model:
        return load_graph(self.source, name)

    def _calibrate(self, samples: Sequence[Sample]) -> dict[str, Statistics]:
        watched = {}
        for name in self.source.manifest.graphs:
            linears = find_linears(self._load(name).graph)
            chosen = [one for one in linears if self.settings.parts[part_of(name, one.name)] != FLOAT]
            if chosen:
                watched[name] = {str(linear.x.name): linear.shape[0] for linear in chosen}
        return calibrate(self.source, samples, watched, self.progress)

    def _plan(self, name: str, statistics: Mapping[str, Statistics]) -> list[GraphPlan]:
        """The plans that a graph is tried with; none where nothing is to be done or told.

        Factors that a linear layer carries help most layers, and may still hurt the graph.
        """
        names = list(self.source.manifest.graphs)
        self.progress("choosing ranges and factors", names.index(name), len(names))
        plans = [plan_graph(name, self._load(name).graph, statistics, self.settings)]
        if plans[0].columns:
            graph = self._load(name).graph
            plans.append(plan_graph(name, graph, statistics, self.settings, products=False))
        self.progress("choosing ranges and factors", names.index(name) + 1, len(names))
        tells = any(layer.precision != FLOAT or layer.note for layer in plans[0].layers.values())
        return plans if tells else []

    def _copy(self, folder: Path, changed: set[str]) -> None:
        """Put the files into the new bundle that stay as they are."""
        dropped = {MANIFEST}
        for name, graph in self.source.manifest.graphs.items():
            if name in changed or (name == "embedding" and self.settings.parts["embedding"] != FLOAT):
                dropped |= {graph.file, graph.data or graph.file}
        self.source.copy((name for name in self.source.manifest.files if name not in dropped), folder)

    def _quantize(
        self,
        folder: Path,
        name: str,
        plans: Sequence[GraphPlan],
        widths: Mapping[str, int],
        recorded: Recorded | None,
    ) -> Written:
        """Write one graph by the best of its plans, with as many layers left out as the budget asks."""
        manifest = self.source.manifest
        written = Written(plans[0], manifest.graphs[name], widths)

        def attempt(plan: GraphPlan) -> float | None:
            written.plan = plan
            written.graph = write_quantized(
                self._load(name), plan, self.settings, folder, manifest.graphs[name]
            )
            if recorded is None or not recorded.outputs:
                return None
            made = self._made(folder, {**manifest.graphs, name: written.graph})
            factors = {
                y: plan.columns[n] for n, y in zip(plan.layers, widths, strict=True) if n in plan.columns
            }
            written.error, written.layers = compare(made, name, recorded, widths, factors)
            return written.error.relative_l2

        best = plans[0]
        if len(plans) > 1 and recorded is not None:
            best = min(plans, key=lambda plan: attempt(plan) or 0.0)
        written.plan = leave_out(best, attempt, self.options.error_budget)
        return written


def _split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """To calibrate on, and held out: spread over the file, because neighbours may be alike."""
    every = max(_HELD_OUT, -(-len(samples) // _MOST_HELD_OUT)) if len(samples) >= _HELD_OUT else 2
    held_out = [sample for index, sample in enumerate(samples) if index % every == every - 1]
    return [sample for index, sample in enumerate(samples) if index % every != every - 1], held_out
