"""Drawings with a line for each row: stages of the first token, and ratios to the unpruned row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from visprune.bench.report.formatting import STAGES, milliseconds, ratio, stage_medians
from visprune.bench.report.page.row_styles import RowStyles
from visprune.bench.report.page.svg import NARROW, Canvas, Scale, text_width
from visprune.bench.report.report import BenchReport, Row

__all__ = ["STAGE_COLOURS", "draw_ratios", "draw_stages"]

STAGE_COLOURS = {name: f"s{index}" for index, name in enumerate(STAGES)}
"""Class of the style sheet for each stage."""

_TOP, _BELOW = 8, 50
_BAR, _GAP = 16, 9
_GROUP = 14  # between precisions


def _layout(rows: Sequence[Row], width: float) -> tuple[float, list[float], float]:
    """Place the bars.

    Names stand left of the bars in a wide drawing, and above them in a narrow one.

    Returns:
        The left end of all bars, the top of each, and the bottom of the last; all in pixels.
    """
    narrow = width <= NARROW
    left = 8.0 if narrow else 12 + max(text_width(row.name) for row in rows)
    pitch = _BAR + _GAP + (16 if narrow else 0)
    tops, y = [], float(_TOP + (16 if narrow else 0))
    for row, following in pairwise([*rows, None]):
        tops.append(y)
        y += pitch
        if row is not None and following is not None and following.precision != row.precision:
            y += _GROUP
    return left, tops, y - _GAP + (0 if not narrow else -8)


def _name(canvas: Canvas, row: Row, left: float, top: float) -> None:
    if canvas.width <= NARROW:
        canvas.text(left, top - 5, row.name)
    else:
        canvas.text(left - 10, top + 12.5, row.name, anchor="end")


def draw_stages(rows: Sequence[Row], width: float) -> Canvas:
    """Draw the medians of the stages of the first token as stacked bars."""
    left, tops, end = _layout(rows, width)
    canvas = Canvas(width, end + _BELOW + 8, "Stages of the time to the first token")
    sums = [sum(stage_medians(row).values()) for row in rows]
    scale = Scale.of(sums, left, width - 62, zero=True, ticks=8 if width > NARROW else 4)
    canvas.x_axis(scale, _TOP, end + 8, "ms to the first token, median of each stage")
    for row, top, total in zip(rows, tops, sums, strict=True):
        _name(canvas, row, left, top)
        x = left
        for name, ms in stage_medians(row).items():
            step = scale(ms) - scale(0)
            tooltip = f"{row.name}, {name}: {milliseconds(ms)} ms"
            canvas.rect(x, top, step, _BAR, f"bar {STAGE_COLOURS[name]}", tooltip)
            x += step
        canvas.text(x + 6, top + 12.5, milliseconds(total), style="tick")
    return canvas


def draw_ratios(report: BenchReport, rows: Sequence[Row], styles: RowStyles, width: float) -> Canvas:
    """Draw the time to the first token relative to the unpruned row, with 99% intervals."""
    left, tops, end = _layout(rows, width)
    canvas = Canvas(width, end + _BELOW + 8, "Time to the first token relative to the unpruned row")
    found = [(row, row.against(full)) for row in rows if (full := report.unpruned(row)) is not None]
    values = [v for _, one in found for v in (one.low, one.high, one.ratio) if v is not None]
    ticks = 8 if width > NARROW else 4
    scale = Scale.of([*values, 1.0], left + 8, width - 20, zero=False, ticks=ticks)
    canvas.x_axis(scale, _TOP, end + 8, "time relative to the unpruned row")
    canvas.line(scale(1.0), _TOP, scale(1.0), end + 8, "unit")
    for (row, one), top in zip(found, tops, strict=True):
        _name(canvas, row, left, top)
        y, style = top + _BAR / 2, styles.colour(row) if one.told else "no-difference"
        if one.low is not None and one.high is not None:
            canvas.line(scale(one.low), y, scale(one.high), y, f"interval {style}")
        canvas.mark(scale(one.ratio), y, styles.shape(row), f"mark {style}", f"{row.name}: {ratio(one)}")
    return canvas
