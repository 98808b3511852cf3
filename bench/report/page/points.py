"""Drawings with two scales: accuracy by latency, latency by kept tokens, tokens by layer."""

from __future__ import annotations

from collections.abc import Sequence

from visprune.bench.report.formatting import kept_tokens, milliseconds
from visprune.bench.report.page.row_styles import RowStyles
from visprune.bench.report.page.svg import NARROW, Canvas, Scale, spread_out, text_width
from visprune.bench.report.report import Row

__all__ = ["draw_accuracy", "draw_latency", "draw_layers", "front", "pruned_inside"]

_LEFT, _RIGHT, _TOP, _BELOW = 48, 16, 34, 50


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the Pareto front: the rows that no other row beats in both time and accuracy, fastest first."""
    best, found = -1.0, []
    for row in sorted(rows, key=lambda row: (row.first_token.median, -_share(row))):
        if _share(row) > best:
            best = _share(row)
            found.append(row)
    return found


def _share(row: Row) -> float:
    return row.accuracy.share if row.accuracy else 0.0


def draw_accuracy(rows: Sequence[Row], styles: RowStyles, width: float) -> Canvas:
    """Draw accuracy by time to the first token, with both spreads; a numbered line is the Pareto front."""
    canvas = Canvas(width, 400 if width > NARROW else 330, "Accuracy by time to the first token")
    bottom = canvas.height - _BELOW
    x = Scale.of((v for r in rows for v in _ends(r)), _LEFT, width - _RIGHT, zero=False, ticks=_ticks(width))
    known = [row.accuracy for row in rows if row.accuracy]
    y = Scale.of((100 * v for a in known for v in (a.low, a.high)), bottom, _TOP, zero=False)
    canvas.y_axis(y, _LEFT, width - _RIGHT, "right answers, %")
    canvas.x_axis(x, _TOP, bottom, "time to the first token, ms")
    best = front(rows)
    steps: list[tuple[float, float]] = []
    for row in best:
        here = (x(row.first_token.median), y(100 * _share(row)))
        steps += [(here[0], steps[-1][1])] if steps else []
        steps.append(here)
    canvas.path(steps, "front")
    for row in rows:
        if row.accuracy:
            px, py = x(row.first_token.median), y(100 * row.accuracy.share)
            low, high = _ends(row)
            canvas.line(x(low), py, x(high), py, f"whisker {styles.colour(row)}")
            canvas.line(
                px, y(100 * row.accuracy.low), px, y(100 * row.accuracy.high), f"whisker {styles.colour(row)}"
            )
    for row in rows:
        tooltip = f"{row.name}: {milliseconds(row.first_token.median)} ms, {_share(row):.1%} right"
        place = (x(row.first_token.median), y(100 * _share(row)))
        canvas.mark(*place, styles.shape(row), f"mark {styles.colour(row)}", tooltip)
    _number(canvas, [(x(row.first_token.median), y(100 * _share(row))) for row in best], bottom)
    return canvas


def _number(canvas: Canvas, places: Sequence[tuple[float, float]], bottom: float) -> None:
    """Write 1, 2, ... next to points, where there is room."""
    taken: list[tuple[float, float]] = []
    around = ((0, -13), (-14, -4), (14, -4), (0, 22), (-14, 14), (14, 14), (0, -28), (-28, -4), (28, -4))
    for number, (px, py) in enumerate(places, 1):
        canvas.ring(px, py, 8.5, "ring")
        options = [
            (px + dx, py + dy)
            for dx, dy in around
            if _TOP < py + dy < bottom and _LEFT + 8 < px + dx < canvas.width - 8
        ]
        free = [o for o in options if all(abs(o[0] - a) > 17 or abs(o[1] - b) > 15 for a, b in taken)]
        clear = [o for o in free if all(abs(o[0] - a) > 15 or abs(o[1] - 4 - b) > 13 for a, b in places)]
        chosen = (clear or free)[:1]
        for tx, ty in chosen:
            canvas.text(tx, ty, str(number), anchor="middle", style="number")
            taken.append((tx, ty))


def draw_latency(rows: Sequence[Row], styles: RowStyles, width: float) -> Canvas:
    """Draw the time to the first token by visual tokens, with a line for each method and precision."""
    canvas = Canvas(width, 360 if width > NARROW else 300, "Time to the first token by visual tokens kept")
    bottom = canvas.height - _BELOW
    x = Scale.of((row.kept for row in rows), _LEFT, width - _RIGHT, zero=True, ticks=_ticks(width))
    y = Scale.of((row.first_token.p90 for row in rows), bottom, _TOP, zero=True)
    canvas.y_axis(y, _LEFT, width - _RIGHT, "time to the first token, ms")
    canvas.x_axis(x, _TOP, bottom, "visual tokens kept, mean over the layers of the LLM")
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.role != "unpruned":
            lines.setdefault((row.method, row.precision), []).append(row)
    full = {row.precision: row for row in rows if row.role == "unpruned"}
    for (_, precision), members in lines.items():
        ends = [full[precision]] if precision in full else []
        known = sorted([*members, *ends], key=lambda row: row.kept)
        course = [(x(row.kept), y(row.first_token.median)) for row in known]
        canvas.path(course, f"line {styles.colour(members[0])} {styles.dashes(members[0])}")
    for row in rows:
        first = row.first_token
        canvas.line(x(row.kept), y(first.p10), x(row.kept), y(first.p90), f"whisker {styles.colour(row)}")
    for row in rows:
        tooltip = f"{row.name}: {kept_tokens(row)} tokens, {milliseconds(row.first_token.median)} ms"
        place = (x(row.kept), y(row.first_token.median))
        canvas.mark(*place, styles.shape(row), f"mark {styles.colour(row)}", tooltip)
    return canvas


def pruned_inside(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that prune inside the LLM; of rows with the same tokens in all layers, the first."""
    found: dict[tuple[int, ...], Row] = {}
    for row in rows:
        if row.prunes_inside:
            found.setdefault(row.layer_tokens, row)
    return list(found.values())


def draw_layers(rows: Sequence[Row], styles: RowStyles, width: float) -> Canvas:
    """Draw the visual tokens that enter each layer, as steps; the name of a row stands at its end."""
    canvas = Canvas(width, 320 if width > NARROW else 290, "Visual tokens that enter each layer of the LLM")
    bottom = canvas.height - _BELOW
    names = [_short(row) for row in rows]
    right = width - 14 - max(map(text_width, names))
    count = len(rows[0].layer_tokens)
    x = Scale(0, count, _LEFT, right, _layer_step(count, right - _LEFT))
    y = Scale.of((max(row.layer_tokens) for row in rows), bottom, _TOP, zero=True)
    canvas.y_axis(y, _LEFT, right, "visual tokens")
    for layer in range(0, count, int(x.step)):
        canvas.text(x(layer + 0.5), bottom + 17, str(layer), anchor="middle", style="tick")
    canvas.text((_LEFT + right) / 2, bottom + 38, "layer of the LLM, from 0", anchor="middle", style="axis")
    for index, row in enumerate(rows):
        course: list[tuple[float, float]] = []
        for layer, held in enumerate(row.layer_tokens):
            course += [(x(layer), y(held) - index), (x(layer + 1), y(held) - index)]
        canvas.path(course, f"line {styles.colour(row)} dash{index % 3}")
    ends = [y(row.layer_tokens[-1]) for row in rows]
    for row, name, wanted, place in zip(rows, names, ends, spread_out(ends, 15, _TOP, bottom), strict=True):
        canvas.line(right, wanted, right + 7, place, f"whisker {styles.colour(row)}")
        canvas.text(right + 10, place + 4, name, style=f"label {styles.colour(row)}")
    return canvas


def _layer_step(count: int, width: float) -> int:
    """Return how many layers apart the labels must be so that they do not touch."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100) if step * width / count > 22)


def _short(row: Row) -> str:
    """Return a row's name without its precision, which does not change which tokens are kept."""
    return row.name.rsplit(",", 1)[0][:22]


def _ends(row: Row) -> tuple[float, float]:
    return row.first_token.p10, row.first_token.p90


def _ticks(width: float) -> int:
    return 8 if width > NARROW else 4
