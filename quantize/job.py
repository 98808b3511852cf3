"""The work of a quantization: calibrate, decide, write, compare, report.

Graphs are loaded one at a time, their weights mapped. Files that do not change are copied.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from visprune.bundle import Bundle
from visprune.manifest import MANIFEST, SCHEMA_VERSION, FileRecord, Graph, GraphError, Parity, Quantization
from visprune.quantize.calibration import Progress, Statistics, calibrate
from visprune.quantize.compare import NEW_TOKENS, Difference, Recorded, compare, outputs_of, record
from visprune.quantize.linears import find_linears, part_of
from visprune.quantize.options import FLOAT, QuantizeOptions, Settings
from visprune.quantize.plan import GraphPlan, plan_graph
from visprune.quantize.report import REPORT, Answers, GraphReport, LayerReport, Report
from visprune.quantize.rewrite import quantize_embedding, write_quantized
from visprune.quantize.search import leave_out
from visprune.quantize.timing import time_graph
from visprune.records import sha256
from visprune.runtime.cores import usable_cores
from visprune.runtime.pipeline import Pipeline, load
from visprune.runtime.samples import Sample, Samples
from visprune.targets import target

__all__ = ["Job", "Judge"]

Judge = Callable[[Pipeline], Sequence[bool]]
"""Asks a pipeline questions with known answers, and says which it answered right."""

# Of the samples one in so many is held out; errors are measured on at most so many.
_HELD_OUT, _MOST_HELD_OUT = 4, 8


@dataclass(slots=True)
class _Written:
    """One graph as it was written last."""

    plan: GraphPlan
    graph: Graph
    widths: Mapping[str, int]
    error: GraphError | None = None
    layers: dict[str, Difference] = field(default_factory=dict)


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
        wanted = self.settings.uses_samples and calibration
        statistics = self._calibrate(calibration) if wanted else {}
        plans = {name: self._plan(name, statistics) for name in self.source.manifest.graphs}
        plans = {name: found for name, found in plans.items() if found}
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
            samples=len(calibration) if statistics else 0,
            held_out=len(held_out),
            skipped=self.samples.skipped,
            machine=f"{_processor()}, {usable_cores()} threads",
            graphs=tuple(self._graph_reports(made, written, recorded)),
            layers=tuple(_layer_reports(written)),
            answers=None,
        )
        records: dict[str, FileRecord] = {}
        self._seal(made, report, records)
        if held_out or judge is not None:
            report = replace(report, answers=self._answers(folder, held_out, answers, judge))
            self._seal(made, report, records)

    def _made(self, folder: Path, graphs: dict[str, Graph]) -> Bundle:
        """The new bundle as far as it is known, for graphs to be opened."""
        known = Quantization(self.settings.parts, 0, (), (), REPORT)
        return Bundle(folder, replace(self.source.manifest, graphs=graphs, quantization=known))

    def _load(self, name: str) -> ir.Model:
        return ir.load(self.source.file(self.source.manifest.graphs[name].file))

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
        """Put the files into the new bundle that stay as they are.

        As copies: onnx refuses to load external data that has more than one hard link.
        """
        dropped = {MANIFEST}
        for name, graph in self.source.manifest.graphs.items():
            if name in changed or (name == "embedding" and self.settings.parts["embedding"] != FLOAT):
                dropped |= {graph.file, graph.data or graph.file}
        for name in self.source.manifest.files:
            if name not in dropped:
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source.file(name), place)

    def _quantize(
        self,
        folder: Path,
        name: str,
        plans: Sequence[GraphPlan],
        widths: Mapping[str, int],
        recorded: Recorded | None,
    ) -> _Written:
        """Write one graph by the best of its plans, with as many layers left out as the budget asks."""
        manifest = self.source.manifest
        shares = target(manifest.target).builds_engines
        written = _Written(plans[0], manifest.graphs[name], widths)

        def attempt(plan: GraphPlan) -> float | None:
            written.plan = plan
            written.graph = write_quantized(
                self._load(name), plan, self.settings, folder, manifest.graphs[name], shares=shares
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

    def _graph_reports(
        self, made: Bundle, written: Mapping[str, _Written], recorded: Mapping[str, Recorded]
    ) -> Iterator[GraphReport]:
        for index, name in enumerate(self.source.manifest.graphs):
            self.progress("timing both bundles", index, len(self.source.manifest.graphs))
            one = written.get(name)
            error = one.error if one is not None else None
            known = recorded.get(name)
            times = None
            if self.options.timing and known is not None and known.feeds and known.feeds[0]:
                times = time_graph(self.source, made, name, known)
            precisions = dict.fromkeys(layer.precision for layer in one.plan.layers.values()) if one else {}
            if name == "embedding":
                precisions = {self.settings.parts["embedding"]: None}
            yield GraphReport(
                graph=name,
                precision=" + ".join(precisions) or FLOAT,
                relative_l2=error.relative_l2 if error else None,
                cosine=error.cosine if error else None,
                bytes=(_bytes(self.source, name), _bytes(made, name)),
                prefill_ms=times.prefill if times else None,
                step_ms=times.step if times else None,
            )

    def _answers(
        self,
        folder: Path,
        held_out: Sequence[Sample],
        expected: Sequence[tuple[int, ...]],
        judge: Judge | None,
    ) -> Answers:
        """Greedy answers of both; those of the float bundle to the held-out samples are known."""
        self.progress("comparing answers", 0, 2)
        with load(folder, verify=False) as pipeline:
            same = sum(
                tuple(pipeline.generate(s.image, s.prompt, max_new_tokens=NEW_TOKENS).token_ids) == tokens
                for s, tokens in zip(held_out, expected, strict=True)
            )
            judged = [] if judge is None else judge(pipeline)
        self.progress("comparing answers", 1, 2)
        judged_before: Sequence[bool] = []
        if judge is not None:
            with load(self.source.path, verify=False) as pipeline:
                judged_before = judge(pipeline)
        self.progress("comparing answers", 2, 2)
        return Answers(len(held_out), same, len(judged), (sum(judged_before), sum(judged)))

    def _seal(self, made: Bundle, report: Report, records: dict[str, FileRecord]) -> None:
        """Write report and manifest; hashes of files that are known are in `records`."""
        (made.path / REPORT).write_text(report.to_json(), encoding="utf-8")
        for path in sorted(path for path in made.path.rglob("*") if path.is_file()):
            name = path.relative_to(made.path).as_posix()
            if name == REPORT or name not in records:
                records[name] = FileRecord(path.stat().st_size, sha256(path))
        manifest = replace(
            made.manifest,
            schema_version=SCHEMA_VERSION,
            parity=Parity(verified=False),
            files={name: record for name, record in records.items() if name != MANIFEST},
            quantization=Quantization(
                parts=report.parts,
                samples=report.samples,
                kept_float=tuple(one.layer for one in report.layers if one.note),
                errors=tuple(
                    GraphError(one.graph, one.relative_l2, one.cosine)
                    for one in report.graphs
                    if one.relative_l2 is not None and one.cosine is not None
                ),
                report=REPORT,
            ),
        )
        (made.path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """To calibrate on, and held out: spread over the file, because neighbours may be alike."""
    every = max(_HELD_OUT, -(-len(samples) // _MOST_HELD_OUT)) if len(samples) >= _HELD_OUT else 2
    held_out = [sample for index, sample in enumerate(samples) if index % every == every - 1]
    return [sample for index, sample in enumerate(samples) if index % every != every - 1], held_out


def _layer_reports(written: Mapping[str, _Written]) -> Iterator[LayerReport]:
    for name, one in written.items():
        outputs = dict(zip(one.plan.layers, one.widths, strict=True))
        for layer, plan in one.plan.layers.items():
            seen = one.layers.get(outputs[layer])
            yield LayerReport(
                graph=name,
                layer=layer,
                precision=plan.precision,
                own_error=plan.error,
                relative_l2=seen.relative_l2 if seen else None,
                cosine=seen.cosine if seen else None,
                note=plan.note,
            )


def _bytes(bundle: Bundle, name: str) -> int:
    graph = bundle.manifest.graphs[name]
    return sum(bundle.file(file).stat().st_size for file in (graph.file, graph.data) if file)


def _processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
