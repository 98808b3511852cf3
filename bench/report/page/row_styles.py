"""Colours and shapes that tell rows apart, the same in every figure.

The colour of a row stands for its method. The shape of its mark and the dashes of its line stand for its
precision. The names returned here are classes of `templates/style.css`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visprune.bench.report.page.svg import Canvas
from visprune.bench.report.report import BASELINES, BenchReport, Row

__all__ = ["LegendEntry", "RowStyles"]

_COLOURS = 6  # besides those of the rows that are there only to compare with
_TO_COMPARE = ("none", *BASELINES, "transformers")


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A line of a legend.

    Attributes:
        name: Text.
        swatch: A small drawing of the mark that the text explains.
    """

    name: str
    swatch: Canvas

    @classmethod
    def of(cls, name: str, colour: str, shape: int) -> LegendEntry:
        """Return an entry for marks of a colour (a class of the style sheet) and a shape."""
        canvas = Canvas(14, 14)
        canvas.mark(7, 7, shape, f"mark {colour}")
        return cls(name, canvas)


@dataclass(frozen=True, slots=True)
class RowStyles:
    """The style of every row of one report.

    Attributes:
        methods: All methods of the report, in the order of its rows.
        precisions: All precisions, likewise.
    """

    methods: tuple[str, ...]
    precisions: tuple[str, ...]

    @classmethod
    def of(cls, report: BenchReport) -> RowStyles:
        """Return the styles for all rows of a report."""
        return cls(
            tuple(dict.fromkeys(_method(row) for row in report.rows)),
            tuple(dict.fromkeys(row.precision for row in report.rows)),
        )

    def colour(self, row: Row) -> str:
        """Return the class of a row's colour."""
        return self._colour(_method(row))

    def shape(self, row: Row) -> int:
        """Return the number of the shape of a row's mark, for `Canvas.mark`."""
        return self.precisions.index(row.precision)

    def dashes(self, row: Row) -> str:
        """Return the class of the dashes of a row's line."""
        return f"dash{self.shape(row) % 3}"

    def legend(self, rows: Sequence[Row]) -> list[LegendEntry]:
        """Return the legend for some rows; precisions are in it only if there are several."""
        methods, precisions = {_method(row) for row in rows}, {row.precision for row in rows}
        entries = [LegendEntry.of(name, self._colour(name), 0) for name in self.methods if name in methods]
        if len(precisions) > 1:
            entries += [
                LegendEntry.of(name, "plain", shape)
                for shape, name in enumerate(self.precisions)
                if name in precisions
            ]
        return entries

    def _colour(self, method: str) -> str:
        if method in _TO_COMPARE:
            return f"c-{method}"
        coloured = [name for name in self.methods if name not in _TO_COMPARE]
        return f"c{coloured.index(method) % _COLOURS}"


def _method(row: Row) -> str:
    return {"pytorch": "transformers", "unpruned": "none"}.get(row.role, row.method)
