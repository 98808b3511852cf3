"""What tells rows apart in every figure: a colour a method, a shape and a dash a precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from visprune.bench.report.page.svg import Canvas
from visprune.bench.report.report import BenchReport, Row

__all__ = ["Looks", "legend", "swatch"]

_COLOURS = 6  # beside grey, which is for what is only there to compare with


@dataclass(frozen=True, slots=True)
class Looks:
    """Of one report.

    Attributes:
        methods: In the order of the table.
        precisions: Likewise.
    """

    methods: tuple[str, ...]
    precisions: tuple[str, ...]

    @classmethod
    def of(cls, report: BenchReport) -> Looks:
        """For all rows of a report."""
        return cls(
            tuple(dict.fromkeys(_method(row) for row in report.rows)),
            tuple(dict.fromkeys(row.precision for row in report.rows)),
        )

    def colour(self, row: Row) -> str:
        """The class of a row's colour."""
        return self._colour(_method(row))

    def shape(self, row: Row) -> int:
        """Of a row's mark."""
        return self.precisions.index(row.precision)

    def dash(self, row: Row) -> str:
        """The class of a row's line."""
        return f"dash{self.shape(row) % 3}"

    def legend(self, rows: Sequence[Row]) -> str:
        """HTML that says which is which, of some rows."""
        methods, precisions = {_method(row) for row in rows}, {row.precision for row in rows}
        items = [(name, swatch(self._colour(name), 0)) for name in self.methods if name in methods]
        if len(precisions) > 1:
            items += [(n, swatch("plain", i)) for i, n in enumerate(self.precisions) if n in precisions]
        return legend(items)

    def _colour(self, method: str) -> str:
        if method == "random":
            return "c-random"
        if method in ("none", "transformers"):
            return "c-none" if method == "none" else "c-torch"
        coloured = [name for name in self.methods if name not in ("none", "random", "transformers")]
        return f"c{coloured.index(method) % _COLOURS}"


def legend(items: list[tuple[str, str]]) -> str:
    """HTML: swatches with their names."""
    return '<ul class="legend">' + "".join(f"<li>{s}{escape(n)}</li>" for n, s in items) + "</ul>"


def swatch(colour: str, shape: int) -> str:
    """A mark for a legend."""
    canvas = Canvas(14, 14, "")
    canvas.mark(7, 7, shape, f"mark {colour}")
    return canvas.svg("swatch").replace('role="img" aria-label=""', 'aria-hidden="true"')


def _method(row: Row) -> str:
    return {"pytorch": "transformers", "unpruned": "none"}.get(row.role, row.method)
