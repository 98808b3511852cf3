"""A report for a terminal: two tables, and what can be said of them."""

from __future__ import annotations

import shutil
from typing import Literal

from visprune.bench.report.formatting import (
    ACCURACY,
    STAGES,
    gflop,
    in_bytes,
    milliseconds,
    share,
    stages,
    times,
    tokens,
)
from visprune.bench.report.report import BenchReport, Row, fastest
from visprune.bench.report.statistics import CONFIDENCE, Difference

__all__ = ["print_report", "verdicts"]

_LEAST_WIDTH = 140  # where nobody is looking, a log for instance


def print_report(report: BenchReport) -> None:
    """Both tables on stdout, with what was measured and how."""
    from rich.console import Console
    from rich.table import Table

    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_LEAST_WIDTH, 24)).columns)
    console = Console(width=width, soft_wrap=True, highlight=False, markup=False)
    accuracy = any(row.accuracy for row in report.rows)
    first = (
        "",
        "tokens",
        "first token",
        "p90",
        "spread",
        "by unpruned",
        "a token",
        "p90",
        "prefill",
        "decode",
    )
    table = Table(*first, *(["right"] if accuracy else []), box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(*_times(report, row), *([_right(row)] if accuracy else []))
    console.print(table)
    console.print()
    energy = any(row.energy for row in report.rows)
    device = any(row.device_bytes is not None for row in report.rows)
    second = ["", "GFLOP", "removed", "realised", "load", "memory", *(["GPU"] if device else [])]
    second += ["cache", "disk", *(["energy"] if energy else []), *STAGES]
    table = Table(*second, box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(*_costs(row, energy=energy, device=device))
    console.print(table)
    console.print()
    for line in (*_legend(report), *verdicts(report)):
        console.print(line)


def _times(report: BenchReport, row: Row) -> list[str]:
    full = report.unpruned(row)
    first, later = row.first_token, row.per_token
    return [
        row.name,
        tokens(row),
        milliseconds(first.median),
        milliseconds(first.p90),
        f"{first.spread:.0%}",
        "-" if full is None or full is row else times(row.against(full)),
        milliseconds(later.median),
        milliseconds(later.p90),
        f"{row.prefill_speed:.0f}/s",
        f"{row.decode_speed:.0f}/s",
    ]


def _right(row: Row) -> str:
    found = row.accuracy
    return f"{found.share:.1%} ({found.low:.1%} to {found.high:.1%})" if found else "-"


def _costs(row: Row, *, energy: bool, device: bool) -> list[str]:
    spent = stages(row)
    used = row.energy
    return [
        row.name,
        gflop(row.flops.model) if row.flops else "-",
        share(row.flops.removed) if row.flops else "-",
        share(row.realised),
        f"{row.load:.0f} ms",
        in_bytes(row.memory_bytes),
        *([in_bytes(row.device_bytes)] if device else []),
        in_bytes(row.cache_bytes),
        in_bytes(row.disk_bytes),
        *([f"{used.median:.3g} J" if used else "-"] if energy else []),
        *(milliseconds(spent.get(name, 0.0)) for name in STAGES),
    ]


def _legend(report: BenchReport) -> list[str]:
    work, machine = report.work, report.machine
    pictures = "picture" if len(work.images) == 1 else f"{len(work.images)} pictures"
    accuracy = next((row.accuracy for row in report.rows if row.accuracy), None)
    flops = next((row.flops for row in report.rows if row.flops), None)
    return [
        f"ms, medians of {work.rounds} rounds after {work.warm_up} to warm up, each row once a round; "
        "spread: 10th to 90th percentile by the median.",
        f"by unpruned: time by that of the unpruned row, with its {CONFIDENCE:.0%} interval over the rounds.",
        "tokens: visual tokens in the layers of the LLM (their mean), of all. realised: share of the time to "
        "the first token that is gone, by the share of the FLOPs.",
        *(
            [f"GFLOP: the prefill with vision tower, 2 a multiply-accumulate, {flops.convention}."]
            if flops
            else []
        ),
        *([f"{ACCURACY}: {accuracy.questions}."] if accuracy else []),
        f"{pictures} and {work.max_new_tokens} new tokens on {machine.gpu or machine.processor}, "
        f"{work.provider}, {work.threads} threads; energy: {machine.energy_counter}.",
        "memory: largest resident set of the row's own process. cache: keys and values after the prefill.",
    ]


def verdicts(report: BenchReport) -> list[str]:
    """What can be said of the rows: which is fastest or that none is, what is missing, notes."""
    said = []
    rows = [row for row in report.rows if row.role in ("given", "unpruned")]
    if len(rows) > 1:
        said += [
            _winner(rows, "first_token", "first token"),
            _winner(rows, "per_token", "each further token"),
        ]
    said += [line for row in report.rows if (line := _against_random(report, row))]
    said += [f"not in the table: {one.what}: {one.reason}" for one in report.not_made]
    return [*said, *report.notes]


def _winner(rows: list[Row], metric: Literal["first_token", "per_token"], what: str) -> str:
    best, ties = fastest(rows, metric)
    if not ties:
        return f"{what}: {best.name} is the fastest."
    names = ", ".join(row.name for row in (best, *ties))
    if len(ties) + 1 == len(rows):
        return f"{what}: no difference can be told between {names}."
    return f"{what}: the fastest are {names}, and no difference can be told between them."


def _against_random(report: BenchReport, row: Row) -> str | None:
    """What choosing tokens costs, where it can be told: as many of them drawn at random take less."""
    if row.role != "given" or row.method in ("random", "none"):
        return None
    alike = [
        one
        for one in report.rows
        if one.method == "random" and (one.weights, one.precision) == (row.weights, row.precision)
    ]
    if not alike:
        return None
    nearest = min(alike, key=lambda one: abs(one.cache_bytes - row.cache_bytes))
    found: Difference = row.against(nearest)
    if not found.told or found.ratio < 1.0:
        return None
    return f"{row.name} takes {times(found)} of the time to the first token of {nearest.name}."
