"""The page: findings first, then the figures, then how it was measured.

This module collects what the page shows; `templates/page.html.jinja` has its markup and its prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from visprune.bench.report.formatting import kept_tokens, milliseconds
from visprune.bench.report.page import figures
from visprune.bench.report.page.facts import facts, method
from visprune.bench.report.page.points import front
from visprune.bench.report.page.row_styles import RowStyles
from visprune.bench.report.page.tables import costs, times
from visprune.bench.report.report import BenchReport, Row
from visprune.bench.report.table import verdicts
from visprune.runtime.vision.sources import display_name

__all__ = ["page"]


@dataclass(frozen=True, slots=True)
class Overlay:
    """An image with the patches that a row keeps.

    Attributes:
        row: Name of the row.
        tokens: How many visual tokens it keeps.
        jpeg: The overlay, in base64.
        description: For readers that do not show images.
    """

    row: str
    tokens: str
    jpeg: str
    description: str


def page(report: BenchReport, pictures: Mapping[str, Sequence[str]]) -> str:
    """Return the text of the HTML file.

    Args:
        report: What was measured.
        pictures: For each row, by its name, the overlays of the images, JPEG in base64.
    """
    styles = RowStyles.of(report)
    machine = report.machine
    where = machine.gpu or machine.processor
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        models=", ".join(dict.fromkeys(row.model for row in report.rows)),
        subtitle=f"{len(report.rows)} rows on {where}, {report.work.threads} threads · {report.created[:10]}",
        facts=facts(report),
        findings=verdicts(report),
        accuracy=figures.accuracy(report, styles),
        questions=next((row.accuracy.questions for row in report.rows if row.accuracy), None),
        front=_front(report),
        ratios=figures.ratios(report, styles),
        stages=figures.stages(report),
        latency=figures.latency(report, styles),
        layers=figures.layers(report, styles),
        gallery=_gallery(report, pictures),
        prompt=report.work.prompt,
        times=times(report),
        costs=costs(report),
        method=method(report),
    )


def _front(report: BenchReport) -> list[str]:
    """Return a line for each row of the Pareto front, fastest first."""
    return [
        f"{row.name}: {milliseconds(row.first_token.median)} ms, {row.accuracy.share:.1%}"
        for row in front([row for row in report.rows if row.accuracy])
        if row.accuracy
    ]


def _gallery(report: BenchReport, pictures: Mapping[str, Sequence[str]]) -> list[tuple[str, list[Overlay]]]:
    """Return the name of each image with its overlays.

    Rows of one method with the same numbers of tokens keep the same patches; the first of them is shown.
    """
    shown: dict[tuple[str, tuple[int, ...]], Row] = {}
    for row in report.rows:
        if pictures.get(row.name):
            shown.setdefault((row.method, row.layer_tokens), row)
    if not shown:
        return []
    return [
        (display_name(image).rsplit("/", 1)[-1], [_overlay(row, pictures, index) for row in shown.values()])
        for index, image in enumerate(report.work.images)
    ]


def _overlay(row: Row, pictures: Mapping[str, Sequence[str]], index: int) -> Overlay:
    description = f"Image {index + 1}, patches kept by {row.name}"
    return Overlay(row.name, kept_tokens(row), pictures[row.name][index], description)
