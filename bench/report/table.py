"""A report for a terminal: two tables, and the sentences that the report supports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from visprune.bench.report.formatting import (
    STAGES,
    accuracy,
    gflop,
    kept_tokens,
    milliseconds,
    percent,
    ratio,
    stage_medians,
)
from visprune.bench.report.report import BASELINES, BenchReport, Role, Row, fastest
from visprune.bench.report.statistics import CONFIDENCE, Difference
from visprune.units import in_bytes

__all__ = ["print_report", "verdicts"]

_LEAST_WIDTH = 170  # columns; also the width where the output is no terminal, such as a log

_TIMES = (
    "",
    "tokens",
    "first token",
    "p90",
    "spread",
    "vs unpruned",
    "a token",
    "p90",
    "prefill",
    "decode",
)


def print_report(report: BenchReport) -> None:
    """Print both tables on stdout, then what was measured and how, then the verdicts."""
    from rich.console import Console
    from rich.table import Table

    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_LEAST_WIDTH, 24)).columns)
    console = Console(width=width, soft_wrap=True, highlight=False, markup=False)
    with_accuracy = any(row.accuracy for row in report.rows)
    table = Table(*_TIMES, *(["right"] if with_accuracy else []), box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(*_times(report, row), *([accuracy(row)] if with_accuracy else []))
    console.print(table)
    console.print()
    energy = any(row.energy for row in report.rows)
    device = any(row.device_bytes is not None for row in report.rows)
    head = ["", "GFLOP", "removed", "realised", "load", "memory", *(["GPU"] if device else [])]
    head += ["cache", "disk", *(["energy"] if energy else []), *STAGES]
    table = Table(*head, box=None, pad_edge=False)
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
        kept_tokens(row),
        milliseconds(first.median),
        milliseconds(first.p90),
        percent(first.spread),
        "-" if full is None or full is row else ratio(row.against(full)),
        milliseconds(later.median),
        milliseconds(later.p90),
        f"{row.prefill_speed:.0f}/s",
        f"{row.decode_speed:.0f}/s",
    ]


def _costs(row: Row, *, energy: bool, device: bool) -> list[str]:
    spent = stage_medians(row)
    used = row.energy
    return [
        row.name,
        gflop(row.flops.model) if row.flops else "-",
        percent(row.flops.removed) if row.flops else "-",
        percent(row.realised),
        f"{row.load:.0f} ms",
        in_bytes(row.memory_bytes),
        *(["-" if row.device_bytes is None else in_bytes(row.device_bytes)] if device else []),
        in_bytes(row.cache_bytes),
        in_bytes(row.disk_bytes),
        *([f"{used.median:.3g} J" if used else "-"] if energy else []),
        *(milliseconds(spent[name]) for name in STAGES),
    ]


def _legend(report: BenchReport) -> list[str]:
    work, machine = report.work, report.machine
    images = ", ".join(
        "an image in the command line" if i.startswith("data:") else Path(i).name for i in work.images
    )
    accuracy = next((row.accuracy for row in report.rows if row.accuracy), None)
    convention = next((row.flops.convention for row in report.rows if row.flops), None)
    return [
        f"Times are ms, medians of {work.rounds} rounds after {work.warm_up} warm-up rounds, each row once a "
        "round. spread: from the 10th to the 90th percentile, divided by the median.",
        "vs unpruned: time to the first token relative to the unpruned row, with its "
        f"{CONFIDENCE:.0%} interval over the rounds.",
        "tokens: visual tokens in the layers of the LLM (their mean), of all. realised: share of the time to "
        "the first token that pruning saves, divided by the share of the FLOPs that it removes.",
        *(
            [f"GFLOP: the prefill with vision tower; a multiply-accumulate is 2, convention {convention}."]
            if convention
            else []
        ),
        *(
            [
                f"right: share of right answers to {accuracy.of} questions, with its 95% interval: "
                f"{accuracy.questions}."
            ]
            if accuracy
            else []
        ),
        f"{images} and {work.max_new_tokens} new tokens on {machine.gpu or machine.processor}, "
        f"{work.provider}, {work.threads} threads; energy: {machine.energy_counter}.",
        *(["The times are those of a second question: the image was encoded before."] if work.cached else []),
        "memory: largest resident set of the row's own process. cache: keys and values after the prefill.",
    ]


def verdicts(report: BenchReport) -> list[str]:
    """Return the sentences that the report supports.

    They say which row is fastest or that none is, where the selection of tokens costs time, which rows a
    smaller picture beats, and what is missing from the table. The report's own notes come last.
    """
    sentences = []
    rows = [row for row in report.rows if row.role in ("given", "unpruned")]
    if len(rows) > 1:
        sentences += [
            _winner(rows, "first_token", "first token"),
            _winner(rows, "per_token", "each further token"),
        ]
    sentences += [
        f"{row.name} takes {ratio(found)} of the time to the first token of {drawn.name}."
        for row, drawn, found in _slower(report, "random")
    ]
    sentences += _smaller_pictures(report)
    sentences += [f"not in the table: {one.what}: {one.reason}" for one in report.not_made]
    return [*sentences, *report.notes]


def _winner(rows: list[Row], metric: Literal["first_token", "per_token"], time: str) -> str:
    best, ties = fastest(rows, metric)
    if not ties:
        return f"{time}: {best.name} is the fastest."
    names = "; ".join(row.name for row in (best, *ties))
    if len(ties) + 1 == len(rows):
        return f"{time}: no difference can be told between {names}."
    return f"{time}: the fastest are {names}, and no difference can be told between them."


def _slower(report: BenchReport, baseline: Role) -> Iterator[tuple[Row, Row, Difference]]:
    """Yield each row that takes longer to the first token than a baseline of about as many tokens.

    Each row is compared with the row of the baseline that has most nearly as many tokens: one of random
    tokens, which are chosen in almost no time, or one of a smaller picture.

    Yields:
        The row, the row of the baseline, and the time of the first divided by that of the second.
    """
    for row in report.rows:
        alike = [
            one
            for one in report.rows
            if one.method == baseline and (one.weights, one.precision) == (row.weights, row.precision)
        ]
        if row.role != "given" or row.method in ("none", *BASELINES) or not alike:
            continue
        nearest = min(alike, key=lambda one: abs(one.cache_bytes - row.cache_bytes))
        found = row.against(nearest)
        if found.told and found.ratio > 1.0:
            yield row, nearest, found


def _smaller_pictures(report: BenchReport) -> list[str]:
    """Return a sentence for each row of a smaller picture that is faster than rows of as many tokens."""
    beaten: dict[str, list[str]] = {}
    for row, smaller, found in _slower(report, "resize"):
        beaten.setdefault(smaller.name, []).append(f"{row.name} takes {ratio(found)}")
    return [
        f"first token: {name} is faster than rows of about as many tokens; relative to it, {', '.join(rows)}."
        for name, rows in beaten.items()
    ]
