"""Figures of a page: each has a legend, a drawing for wide and one for narrow screens, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visprune.bench.report.page import tables
from visprune.bench.report.page.bars import STAGE_COLOURS, draw_ratios, draw_stages
from visprune.bench.report.page.points import draw_accuracy, draw_latency, draw_layers, pruned_inside
from visprune.bench.report.page.row_styles import LegendEntry, RowStyles
from visprune.bench.report.page.svg import NARROW, WIDE, Canvas
from visprune.bench.report.page.tables import Column, Table
from visprune.bench.report.report import BenchReport, Row

__all__ = ["PageFigure", "accuracy", "latency", "layers", "ratios", "stages"]


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A figure.

    Attributes:
        legend: May be empty.
        wide: The drawing for wide screens; the style sheet shows one of the two.
        narrow: The drawing for narrow screens.
        numbers: What is drawn, as a table.
    """

    legend: Sequence[LegendEntry]
    wide: Canvas
    narrow: Canvas
    numbers: Table

    @classmethod
    def of(
        cls,
        draw: Callable[[float], Canvas],
        columns: Sequence[Column],
        rows: Sequence[Row],
        legend: Sequence[LegendEntry] = (),
    ) -> PageFigure:
        """Return a figure.

        Args:
            draw: Draws it for a width in pixels.
            columns: Of the table of its numbers.
            rows: What it shows.
            legend: May be empty.
        """
        return cls(legend, draw(WIDE), draw(NARROW), Table.of(columns, rows))


def accuracy(report: BenchReport, styles: RowStyles) -> PageFigure | None:
    """Return the figure of accuracy by latency; None if accuracy was not measured."""
    rows = [row for row in report.rows if row.accuracy]
    if not rows:
        return None
    columns = (tables.FIRST_TOKEN, tables.P10, tables.P90, tables.ACCURACY)
    return PageFigure.of(
        lambda width: draw_accuracy(rows, styles, width), columns, rows, legend=styles.legend(rows)
    )


def ratios(report: BenchReport, styles: RowStyles) -> PageFigure | None:
    """Return the figure of times relative to the unpruned row; None if there is nothing to compare."""
    rows = [row for row in report.rows if row.role != "pytorch" and report.unpruned(row) not in (None, row)]
    if not rows:
        return None
    columns = (tables.relative(report),)
    return PageFigure.of(
        lambda width: draw_ratios(report, rows, styles, width), columns, rows, legend=styles.legend(rows)
    )


def stages(report: BenchReport) -> PageFigure:
    """Return the figure of the stages of the first token."""
    legend = [LegendEntry.of(name, colour, shape=1) for name, colour in STAGE_COLOURS.items()]
    rows = report.rows
    return PageFigure.of(lambda width: draw_stages(rows, width), tables.STAGE_TIMES, rows, legend=legend)


def latency(report: BenchReport, styles: RowStyles) -> PageFigure | None:
    """Return the figure of latency by kept tokens; None if all rows keep the same number."""
    rows = [row for row in report.rows if row.role != "pytorch"]
    if len({row.kept for row in rows}) < 2:
        return None
    columns = (tables.TOKENS, tables.FIRST_TOKEN, tables.P10, tables.P90)
    return PageFigure.of(
        lambda width: draw_latency(rows, styles, width), columns, rows, legend=styles.legend(rows)
    )


def layers(report: BenchReport, styles: RowStyles) -> PageFigure | None:
    """Return the figure of tokens by layer; None if no row prunes inside the LLM."""
    rows = pruned_inside(report.rows)
    if not rows:
        return None
    return PageFigure.of(lambda width: draw_layers(rows, styles, width), (tables.LAYER_TOKENS,), rows)
