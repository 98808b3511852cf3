"""The outcome of a quantization: the rows of its report, the comparison of answers, and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from visprune.bundle import Bundle
from visprune.manifest import MANIFEST, SCHEMA_VERSION, FileRecord, Graph, GraphError, Parity, Quantization
from visprune.progress import Progress
from visprune.quantize.layer_choices import GraphChoices
from visprune.quantize.output_error import COMPARED_TOKENS, OutputError, RecordedGraph
from visprune.quantize.quantize_options import FLOAT
from visprune.quantize.timing import time_graph
from visprune.quantize.verdict import REPORT, Answers, GraphReport, LayerReport, Report
from visprune.records import sha256
from visprune.runtime.loading import load
from visprune.runtime.pipeline import Pipeline
from visprune.runtime.samples import Sample

__all__ = [
    "Judge",
    "WrittenGraph",
    "compare_answers",
    "graph_reports",
    "layer_reports",
    "write_manifest",
]

Judge = Callable[[Pipeline], Sequence[bool]]
"""Asks a pipeline questions with known answers, and returns for each whether it was answered right."""


@dataclass(slots=True)
class WrittenGraph:
    """A quantized graph, as it was written last.

    Attributes:
        choices: How its layers are quantized.
        graph: Its files and interface.
        widths: The outputs of its linear layers, in the order of `choices.layers`, with the channels of each.
        error: The error of its output; None if not measured.
        layers: The errors of the outputs of its linear layers, by the names of these outputs.
    """

    choices: GraphChoices
    graph: Graph
    widths: Mapping[str, int]
    error: GraphError | None = None
    layers: dict[str, OutputError] = field(default_factory=dict)


def graph_reports(
    before: Bundle,
    after: Bundle,
    written: Mapping[str, WrittenGraph],
    recorded: Mapping[str, RecordedGraph],
    embedding: str,
    progress: Progress,
) -> Iterator[GraphReport]:
    """Time each graph in both bundles, and yield its report.

    Args:
        before: The float bundle.
        after: The quantized bundle, complete but for its hashes.
        written: The graphs that were quantized.
        recorded: Recorded inputs to time the graphs with. Graphs without any are not timed.
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
        precisions = dict.fromkeys(layer.precision for layer in one.choices.layers.values()) if one else {}
        yield GraphReport(
            graph=name,
            precision=embedding if name == "embedding" else " + ".join(precisions) or FLOAT,
            relative_l2=error.relative_l2 if error else None,
            cosine=error.cosine if error else None,
            bytes=(_bytes(before, name), _bytes(after, name)),
            prefill=prefill,
            step=step,
        )


def layer_reports(written: Mapping[str, WrittenGraph]) -> Iterator[LayerReport]:
    """Yield the report of each linear layer of the graphs that were quantized."""
    for name, one in written.items():
        outputs = dict(zip(one.choices.layers, one.widths, strict=True))
        for layer, choice in one.choices.layers.items():
            seen = one.layers.get(outputs[layer])
            yield LayerReport(
                graph=name,
                layer=layer,
                precision=choice.precision,
                own_error=choice.error,
                relative_l2=seen.relative_l2 if seen else None,
                cosine=seen.cosine if seen else None,
                note=choice.note,
            )


def compare_answers(
    before: Bundle,
    after: Path,
    held_out: Sequence[Sample],
    expected: Sequence[tuple[int, ...]],
    judge: Judge | None,
    progress: Progress,
) -> Answers:
    """Compare the greedy answers of both bundles.

    Args:
        before: The float bundle.
        after: Directory of the quantized bundle.
        held_out: Samples that no range comes from.
        expected: The float bundle's tokens for each of them.
        judge: Asks both bundles questions with known answers; None: no questions are asked.
        progress: Called as the work goes on.
    """
    progress("comparing answers", 0, 2)
    with load(after, verify=False) as pipeline:
        same = sum(
            tuple(pipeline.generate(s.image, s.prompt, max_new_tokens=COMPARED_TOKENS).token_ids) == tokens
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


def write_manifest(made: Bundle, report: Report, records: dict[str, FileRecord]) -> None:
    """Write the report and the manifest of a quantized bundle.

    Args:
        made: The bundle. Its manifest has its graphs, and not yet the hashes of its files.
        report: The report.
        records: Sizes and hashes that are known already. Those of all other files are added.
    """
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
