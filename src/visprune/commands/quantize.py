"""`visprune quantize`: make an INT8, FP8 or INT4 bundle from a float one, and report its cost and gain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from visprune.commands.arguments import BundleDir
from visprune.commands.option_fields import with_options
from visprune.quantize.quantize_options import QuantizeOptions
from visprune.terminal import bars, print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from visprune.bundle import Bundle
    from visprune.quantize.outcome import Judge

__all__ = ["judge_for", "print_report", "quantize", "read_report"]

_QUESTIONS = 200  # asked of both bundles of the demo model
_SHOWN = 5  # layers with the largest errors
_WIDTH = 110  # columns of the table, if stdout is no terminal


@with_options(QuantizeOptions, before={"calibration": ("output",)})
def quantize(
    bundle: BundleDir,
    *,
    options: QuantizeOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the new bundle.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead.")] = False,
) -> None:
    """Quantize the linear layers of a bundle.

    Example: visprune-quantize llava-fopru --precision int8 --calibration images.jsonl -o llava-fopru-int8
    """
    with bars() as progress:
        from visprune.bundle import Bundle
        from visprune.quantize.quantizer import quantize_bundle

        source = Bundle.open(bundle)
        made = quantize_bundle(source, output, options, judge=judge_for(source), progress=progress)
    report = read_report(made)
    if as_json:
        print_json({"bundle": str(made.path), **report})
    else:
        print_report(made, report)


def judge_for(bundle: Bundle) -> Judge | None:
    """Return a judge with questions about the demo model's images; None for a bundle of another model."""
    from visprune.bundled import DEMO

    if bundle.manifest.source.model != DEMO:
        return None
    from visprune.demo.answers import right_answers
    from visprune.demo.held_out import held_out

    images, asked = held_out(_QUESTIONS)
    return lambda pipeline: right_answers(pipeline, images, asked)


def read_report(bundle: Bundle) -> dict[str, Any]:
    """Read the report in a quantized bundle."""
    assert bundle.manifest.quantization is not None
    text = bundle.file(bundle.manifest.quantization.report).read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def print_report(bundle: Bundle, report: dict[str, Any]) -> None:
    """Print a report: the verdict and the bundle, then a row for each graph and the layers to look at."""
    from rich.console import Console

    # A terminal has a width of its own; in a file or a pipe the table must not be wrapped at 80 columns.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(soft_wrap=True, highlight=False, markup=False, width=width)
    console.print(report["verdict"])
    left = [layer for layer in report["layers"] if layer["note"]]
    if left:
        console.print(f"kept float: {len(left)} of {len(report['layers'])} layers, listed below")
    total = sum(record.size for record in bundle.manifest.files.values())
    console.print(f"wrote {bundle.path} ({in_bytes(total)})\n")
    console.print(_graph_table(report["graphs"]))
    held_out = report["held_out"]
    console.print(f"\nerror: relative L2 of the output for the same inputs, on {held_out} held-out samples")
    console.print(f"MB, ms: float > quantized; medians of runs in turns, on {report['machine']}")
    worst = sorted(report["layers"], key=lambda layer: -(layer["own_error"] or 0.0))[:_SHOWN]
    if worst and worst[0]["own_error"]:
        console.print("largest errors of single layers:")
        for layer in worst:
            console.print(f"  {layer['own_error'] or 0.0:6.2%}  {layer['layer']}")
    for layer in left:
        console.print(f"float: {layer['layer']} ({layer['note']})")
    for line in report["skipped"]:
        console.print(f"skipped: {line}")
    answers = report["answers"]
    if answers and answers["questions"]:
        before, after = answers["right"]
        console.print(f"right answers: {before} > {after} of {answers['questions']}")
    if answers and answers["samples"]:
        console.print(f"same greedy answers: {answers['same']} of {answers['samples']} held-out samples")


def _graph_table(graphs: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    columns = ("graph", "precision", "error", "cosine", "MB", "ms", "ms a token")
    table = Table(*columns, box=None, pad_edge=False)
    for graph in graphs:
        table.add_row(
            graph["graph"],
            graph["precision"],
            "-" if graph["relative_l2"] is None else f"{graph['relative_l2']:.2%}",
            "-" if graph["cosine"] is None else f"{graph['cosine']:.5f}",
            _pair(*(count / 1e6 for count in graph["bytes"])),
            _times(graph["prefill"]),
            _times(graph["step"]),
        )
    return table


def _times(times: dict[str, float] | None) -> str:
    return "-" if times is None else _pair(times["before"], times["after"])


def _pair(before: float, after: float) -> str:
    return f"{_short(before)} > {_short(after)}"


def _short(value: float) -> str:
    """Format a number with three digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
