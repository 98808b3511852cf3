"""The steps of a quantization: calibrate, choose, write, compare, report.

Graphs are loaded one at a time, with their weights mapped. Files that do not change are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from visprune.bundle import Bundle
from visprune.cores import processor_name, usable_cores
from visprune.manifest import MANIFEST, FileRecord, Graph, Quantization
from visprune.progress import Progress
from visprune.quantize.bundle_graphs import load_graph
from visprune.quantize.calibration import Statistics, calibrate
from visprune.quantize.layer_choices import GraphChoices, choose_layers
from visprune.quantize.linears import find_linears, part_of
from visprune.quantize.outcome import (
    Judge,
    WrittenGraph,
    compare_answers,
    graph_reports,
    layer_reports,
    write_manifest,
)
from visprune.quantize.output_error import RecordedGraph, compare, output_widths, record
from visprune.quantize.quantize_options import FLOAT, QuantizeOptions, ResolvedOptions
from visprune.quantize.quantized_graph import quantize_embedding, write_quantized
from visprune.quantize.search import leave_out
from visprune.quantize.verdict import REPORT, Report
from visprune.runtime.samples import Sample, Samples

__all__ = ["QuantizeJob"]

# One sample in 4 is held out, and at most 8 in all; errors are measured on these.
_HELD_OUT, _MOST_HELD_OUT = 4, 8


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """A quantization whose options have been checked; see `quantize`.

    Attributes:
        source: The float bundle.
        resolved: The options, as resolved for this bundle.
        options: The options as given.
        samples: The calibration data; without samples no ranges are found and no errors measured.
        progress: Called as the work goes on.
    """

    source: Bundle
    resolved: ResolvedOptions
    options: QuantizeOptions
    samples: Samples
    progress: Progress

    def write(self, folder: Path, judge: Judge | None) -> None:
        """Write the quantized bundle.

        Args:
            folder: An empty directory.
            judge: Asks both bundles questions with known answers; None: no questions are asked.
        """
        calibration, held_out = _split(self.samples.usable)
        ranged = calibration if self.resolved.uses_samples else []
        statistics = self._calibrate(ranged) if ranged else {}
        choices = {name: self._choose(name, statistics) for name in self.source.manifest.graphs}
        choices = {name: found for name, found in choices.items() if found}
        del statistics  # they may be large
        widths = {name: output_widths(self.source, name) for name in choices}
        recorded: dict[str, RecordedGraph] = {}
        answers: list[tuple[int, ...]] = []
        if held_out:
            recorded, answers = record(self.source, held_out, widths, self.progress)
        self._copy_unchanged(folder, set(choices))
        written = {}
        for index, name in enumerate(choices):
            self.progress("quantizing", index, len(choices))
            written[name] = self._quantize(folder, name, choices[name], widths[name], recorded.get(name))
        graphs = {**self.source.manifest.graphs, **{name: one.graph for name, one in written.items()}}
        if self.resolved.parts["embedding"] != FLOAT:
            graphs["embedding"] = quantize_embedding(
                self._load("embedding"), self.resolved, folder, graphs["embedding"]
            )
        self.progress("quantizing", len(choices), len(choices))
        made = self._unfinished(folder, graphs)
        report = Report(
            parts=self.resolved.parts,
            samples=len(ranged),
            held_out=len(held_out),
            skipped=self.samples.skipped,
            machine=f"{processor_name()}, {usable_cores()} threads",
            graphs=tuple(
                graph_reports(
                    self.source,
                    made,
                    written,
                    recorded if self.options.timing else {},
                    self.resolved.parts["embedding"],
                    self.progress,
                )
            ),
            layers=tuple(layer_reports(written)),
            answers=None,
        )
        records: dict[str, FileRecord] = {}
        write_manifest(made, report, records)
        if held_out or judge is not None:
            found = compare_answers(self.source, folder, held_out, answers, judge, self.progress)
            report = replace(report, answers=found)
            write_manifest(made, report, records)

    def _unfinished(self, folder: Path, graphs: dict[str, Graph]) -> Bundle:
        """Return the unfinished bundle, without hashes and report, so that its graphs can be opened."""
        known = Quantization(self.resolved.parts, 0, (), (), REPORT)
        return Bundle(folder, replace(self.source.manifest, graphs=graphs, quantization=known))

    def _load(self, name: str) -> ir.Model:
        return load_graph(self.source, name)

    def _calibrate(self, samples: Sequence[Sample]) -> dict[str, Statistics]:
        widths = {}
        for name in self.source.manifest.graphs:
            linears = find_linears(self._load(name).graph)
            chosen = [one for one in linears if self.resolved.parts[part_of(name, one.name)] != FLOAT]
            if chosen:
                widths[name] = {str(linear.x.name): linear.shape[0] for linear in chosen}
        return calibrate(self.source, samples, widths, self.progress)

    def _choose(self, name: str, statistics: Mapping[str, Statistics]) -> list[GraphChoices]:
        """Return the choices to try for a graph; none if the graph is neither changed nor reported.

        There are up to two, because factors that a linear layer carries for another one help most layers, and
        may still increase the error of the graph. The second has no such factors.
        """
        names = list(self.source.manifest.graphs)
        self.progress("choosing ranges and factors", names.index(name), len(names))
        found = [choose_layers(name, self._load(name).graph, statistics, self.resolved)]
        if found[0].columns:
            graph = self._load(name).graph
            found.append(choose_layers(name, graph, statistics, self.resolved, products=False))
        self.progress("choosing ranges and factors", names.index(name) + 1, len(names))
        reported = any(layer.precision != FLOAT or layer.note for layer in found[0].layers.values())
        return found if reported else []

    def _copy_unchanged(self, folder: Path, changed: set[str]) -> None:
        """Copy the files that stay as they are into the new bundle."""
        dropped = {MANIFEST}
        for name, graph in self.source.manifest.graphs.items():
            if name in changed or (name == "embedding" and self.resolved.parts["embedding"] != FLOAT):
                dropped |= {graph.file, graph.data or graph.file}
        self.source.copy((name for name in self.source.manifest.files if name not in dropped), folder)

    def _quantize(
        self,
        folder: Path,
        name: str,
        candidates: Sequence[GraphChoices],
        widths: Mapping[str, int],
        recorded: RecordedGraph | None,
    ) -> WrittenGraph:
        """Write one graph by the best of its choices, with layers left float as the error budget requires."""
        manifest = self.source.manifest
        written = WrittenGraph(candidates[0], manifest.graphs[name], widths)

        def attempt(choices: GraphChoices) -> float | None:
            written.choices = choices
            written.graph = write_quantized(
                self._load(name), choices, self.resolved, folder, manifest.graphs[name]
            )
            if recorded is None or not recorded.outputs:
                return None
            made = self._unfinished(folder, {**manifest.graphs, name: written.graph})
            factors = {
                output: choices.columns[layer]
                for layer, output in zip(choices.layers, widths, strict=True)
                if layer in choices.columns
            }
            written.error, written.layers = compare(made, name, recorded, widths, factors)
            return written.error.relative_l2

        best = candidates[0]
        if len(candidates) > 1 and recorded is not None:
            best = min(candidates, key=lambda choices: attempt(choices) or 0.0)
        written.choices = leave_out(best, attempt, self.options.error_budget)
        return written


def _split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those to calibrate on and those held out.

    The held-out ones are spread over the file, because neighbours in it may be alike.
    """
    every = max(_HELD_OUT, -(-len(samples) // _MOST_HELD_OUT)) if len(samples) >= _HELD_OUT else 2
    held_out = [sample for index, sample in enumerate(samples) if index % every == every - 1]
    return [sample for index, sample in enumerate(samples) if index % every != every - 1], held_out
