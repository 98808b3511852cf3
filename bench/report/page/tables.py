"""Tables of a page: columns are a title and what a row has to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from visprune.bench.report.formatting import gflop, in_bytes, milliseconds, share, tokens
from visprune.bench.report.report import BenchReport, Row

__all__ = ["TIMES", "Column", "costs", "html_table"]


@dataclass(frozen=True, slots=True)
class Column:
    """Its title, and the text of a row."""

    title: str
    text: Callable[[Row], str]


def _right(row: Row) -> str:
    found = row.accuracy
    return f"{found.share:.1%} ({found.low:.1%} to {found.high:.1%})" if found else "-"


TIMES = {
    "tokens": Column("visual tokens", tokens),
    "first": Column("first token, ms", lambda row: milliseconds(row.first_token.median)),
    "p10": Column("p10", lambda row: milliseconds(row.first_token.p10)),
    "p90": Column("p90", lambda row: milliseconds(row.first_token.p90)),
    "spread": Column("spread", lambda row: f"{row.first_token.spread:.0%}"),
    "later": Column("a later token, ms", lambda row: milliseconds(row.per_token.median)),
    "prefill": Column("prefill, tokens/s", lambda row: f"{row.prefill_speed:,.0f}"),
    "decode": Column("decode, tokens/s", lambda row: f"{row.decode_speed:,.0f}"),
    "right": Column("right (95% interval)", _right),
}


def costs(report: BenchReport) -> list[Column]:
    """Work, memory, disk; energy and the GPU's memory where they are known."""
    found = [
        Column("GFLOP", lambda row: gflop(row.flops.model) if row.flops else "-"),
        Column("removed", lambda row: share(row.flops.removed) if row.flops else "-"),
        Column("realised", lambda row: share(row.realised)),
        Column("load, ms", lambda row: f"{row.load:,.0f}"),
        Column("memory", lambda row: in_bytes(row.memory_bytes)),
        Column("cache", lambda row: in_bytes(row.cache_bytes)),
        Column("on disk", lambda row: in_bytes(row.disk_bytes)),
    ]
    if any(row.device_bytes is not None for row in report.rows):
        found.append(Column("GPU memory", lambda row: in_bytes(row.device_bytes)))
    if any(row.energy for row in report.rows):
        found.append(Column("energy, J", lambda row: f"{row.energy.median:.3g}" if row.energy else "-"))
    return found


def html_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table that scrolls by itself where it is wider than the screen."""
    head = "".join(f"<th>{escape(title)}</th>" for title in ("", *(column.title for column in columns)))
    lines = [
        "<tr>"
        + "".join(f"<td>{escape(text)}</td>" for text in (row.name, *(c.text(row) for c in columns)))
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
