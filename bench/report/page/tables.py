"""Tables of a page: a line for each row of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from visprune.bench.report.formatting import (
    STAGES,
    accuracy,
    gflop,
    in_bytes,
    kept_tokens,
    milliseconds,
    percent,
    ratio,
    stage_medians,
)
from visprune.bench.report.report import BenchReport, Row

__all__ = [
    "ACCURACY",
    "FIRST_TOKEN",
    "LAYER_TOKENS",
    "P10",
    "P90",
    "STAGE_TIMES",
    "TOKENS",
    "Column",
    "Table",
    "costs",
    "relative",
    "times",
]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        text: Returns the cell of a row.
    """

    title: str
    text: Callable[[Row], str]


@dataclass(frozen=True, slots=True)
class Table:
    """The text of a table; the first column has the names of the rows.

    Attributes:
        head: Titles of the columns.
        lines: The cells of each row.
    """

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[Column], rows: Iterable[Row]) -> Table:
        """Fill a table."""
        head = ("", *(column.title for column in columns))
        return cls(head, tuple((row.name, *(column.text(row) for column in columns)) for row in rows))


TOKENS = Column("visual tokens", kept_tokens)
FIRST_TOKEN = Column("first token, ms", lambda row: milliseconds(row.first_token.median))
P10 = Column("p10", lambda row: milliseconds(row.first_token.p10))
P90 = Column("p90", lambda row: milliseconds(row.first_token.p90))
SPREAD = Column("spread", lambda row: percent(row.first_token.spread))
PER_TOKEN = Column("a later token, ms", lambda row: milliseconds(row.per_token.median))
PREFILL = Column("prefill, tokens/s", lambda row: f"{row.prefill_speed:,.0f}")
DECODE = Column("decode, tokens/s", lambda row: f"{row.decode_speed:,.0f}")
ACCURACY = Column("right (95% interval)", accuracy)
LAYER_TOKENS = Column(
    "visual tokens that enter layers 0, 1, ...", lambda row: ", ".join(map(str, row.layer_tokens))
)


def _stage(name: str) -> Column:
    return Column(f"{name}, ms", lambda row: milliseconds(stage_medians(row)[name]))


STAGE_TIMES = tuple(_stage(name) for name in STAGES)


def relative(report: BenchReport) -> Column:
    """Return the column of the time to the first token relative to the unpruned row."""

    def text(row: Row) -> str:
        full = report.unpruned(row)
        return "-" if full is None or full is row else ratio(row.against(full))

    return Column("vs unpruned", text)


def times(report: BenchReport) -> Table:
    """Return the table of times; accuracy is in it if it was measured."""
    columns = [TOKENS, FIRST_TOKEN, P90, SPREAD, relative(report), PER_TOKEN, PREFILL, DECODE]
    if any(row.accuracy for row in report.rows):
        columns.append(ACCURACY)
    return Table.of(columns, report.rows)


def costs(report: BenchReport) -> Table:
    """Return the table of work, memory and disk; energy and GPU memory are in it if they are known."""
    columns = [
        Column("GFLOP", lambda row: gflop(row.flops.model) if row.flops else "-"),
        Column("removed", lambda row: percent(row.flops.removed) if row.flops else "-"),
        Column("realised", lambda row: percent(row.realised)),
        Column("load, ms", lambda row: f"{row.load:,.0f}"),
        Column("memory", lambda row: in_bytes(row.memory_bytes)),
        Column("cache", lambda row: in_bytes(row.cache_bytes)),
        Column("on disk", lambda row: in_bytes(row.disk_bytes)),
    ]
    if any(row.device_bytes is not None for row in report.rows):
        columns.append(Column("GPU memory", lambda row: in_bytes(row.device_bytes)))
    if any(row.energy for row in report.rows):
        columns.append(Column("energy, J", lambda row: f"{row.energy.median:.3g}" if row.energy else "-"))
    return Table.of(columns, report.rows)
