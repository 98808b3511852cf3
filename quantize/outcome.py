"""What is told of a quantization, and the manifest that says so."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from visprune.bundle import Bundle
from visprune.manifest import MANIFEST, SCHEMA_VERSION, FileRecord, Graph, GraphError, Parity, Quantization
from visprune.progress import Progress
from visprune.quantize.layer_choices import GraphPlan
from visprune.quantize.output_error import NEW_TOKENS, Difference, Recorded
from visprune.quantize.quantize_options import FLOAT
from visprune.quantize.timing import time_graph
from visprune.quantize.verdict import REPORT, Answers, GraphReport, LayerReport, Report
from visprune.records import sha256
from visprune.runtime.pipeline import Pipeline, load
from visprune.runtime.samples import Sample

__all__ = ["Judge", "Written", "compare_answers", "graph_reports", "layer_reports", "processor", "seal"]

Judge = Callable[[Pipeline], Sequence[bool]]
"""Asks a pipeline questions with known answers, and says which it answered right."""


@dataclass(slots=True)
class Written:
    """One graph as it was written last."""

    plan: GraphPlan
    graph: Graph
    widths: Mapping[str, int]
    error: GraphError | None = None
    layers: dict[str, Difference] = field(default_factory=dict)


def graph_reports(
    before: Bundle,
    after: Bundle,
    written: Mapping[str, Written],
    recorded: Mapping[str, Recorded],
    embedding: str,
    progress: Progress,
) -> Iterator[GraphReport]:
    """A row for each graph.

    Args:
        before: The float bundle.
        after: The quantized one, complete but for its hashes.
        written: The graphs that were quantized.
        recorded: What to time them with; nothing is timed that is not in it.
        embedding: Precision of the token table.
        progress: Called as the work goes on.
    """
    names = list(before.manifest.graphs)
    for index, name in enumerate(names):
        progress("timing both bundles", index, len(names))
        one, known = written.get(name), recorded.get(name)
        error = one.error if one is not None else None
        timed = known is not None and known.feeds and known.feeds[0]
        prefill, step = time_graph(before, after, name, known) if known and timed else (None, None)
        precisions = dict.fromkeys(layer.precision for layer in one.plan.layers.values()) if one else {}
        yield GraphReport(
            graph=name,
            precision=embedding if name == "embedding" else " + ".join(precisions) or FLOAT,
            relative_l2=error.relative_l2 if error else None,
            cosine=error.cosine if error else None,
            bytes=(_bytes(before, name), _bytes(after, name)),
            prefill=prefill,
            step=step,
        )


def layer_reports(written: Mapping[str, Written]) -> Iterator[LayerReport]:
    """A row for each linear layer."""
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


def compare_answers(
    before: Bundle,
    after: Path,
    held_out: Sequence[Sample],
    expected: Sequence[tuple[int, ...]],
    judge: Judge | None,
    progress: Progress,
) -> Answers:
    """Greedy answers of both bundles.

    Args:
        before: The float bundle.
        after: Directory of the quantized one.
        held_out: Samples that no range comes from.
        expected: The float bundle's tokens for each of them.
        judge: Asks both questions with known answers.
        progress: Called as the work goes on.
    """
    progress("comparing answers", 0, 2)
    with load(after, verify=False) as pipeline:
        same = sum(
            tuple(pipeline.generate(s.image, s.prompt, max_new_tokens=NEW_TOKENS).token_ids) == tokens
            for s, tokens in zip(held_out, expected, strict=True)
        )
        judged = [] if judge is None else judge(pipeline)
    progress("comparing answers", 1, 2)
    judged_before: Sequence[bool] = []
    if judge is not None:
        with load(before.path, verify=False) as pipeline:
            judged_before = judge(pipeline)
    progress("comparing answers", 2, 2)
    return Answers(len(held_out), same, len(judged), (sum(judged_before), sum(judged)))


def seal(made: Bundle, report: Report, records: dict[str, FileRecord]) -> None:
    """Write report and manifest; files whose hashes are in `records` are not read again."""
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


def _bytes(bundle: Bundle, name: str) -> int:
    graph = bundle.manifest.graphs[name]
    return sum(bundle.file(file).stat().st_size for file in (graph.file, graph.data) if file)


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
