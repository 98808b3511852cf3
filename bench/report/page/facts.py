"""What stands around the figures of a page: the numbers to begin with, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from visprune.bench.report.formatting import in_bytes, share
from visprune.bench.report.report import BenchReport, Row

__all__ = ["facts", "method"]


def facts(report: BenchReport) -> str:
    """HTML: a few large numbers, each with what it is."""
    rows = [row for row in report.rows if row.role == "given"]
    found = [*_speed(report, rows), *_fewest(report, rows), *_work(rows)]
    items = "".join(f'<div class="fact"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in found)
    return f'<div class="facts">{items}</div>' if items else ""


def _speed(report: BenchReport, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    pairs = [(row, full) for row in rows if (full := report.unpruned(row)) is not None]
    told = [(found.ratio, row) for row, full in pairs if (found := row.against(full)).told]
    ratio, row = min(told, key=lambda one: one[0], default=(1.0, None))
    if row is not None and ratio < 1.0:
        yield f"{1 / ratio:.2g}x", f"faster to the first token than unpruned, at most: {row.name}"


def _fewest(report: BenchReport, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    full = next((row.accuracy for row in report.rows if row.role == "unpruned" and row.accuracy), None)
    if full is None:
        return
    close = [row for row in rows if row.accuracy and row.accuracy.share >= full.low]
    if close:
        least = min(close, key=lambda row: row.kept)
        yield (
            f"{least.kept:.3g} of {least.visual_tokens}",
            f"visual tokens at the least, with as many right answers as the 95% interval of the unpruned row "
            f"allows: {least.name}",
        )


def _work(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    removed = [(row.flops.removed, row) for row in rows if row.flops]
    if removed:
        most, row = max(removed, key=lambda one: one[0])
        yield share(most), f"of the prefill's FLOPs removed, at most: {row.name}"
    realised = sorted(row.realised for row in rows if row.realised is not None)
    if realised:
        middle = realised[len(realised) // 2]
        yield share(middle), "of the saving in FLOPs is a saving in time too, in the median row"


def method(report: BenchReport) -> str:
    """HTML: how and where it was measured."""
    work, machine = report.work, report.machine
    images = "1 image" if len(work.images) == 1 else f"{len(work.images)} images"
    system = "" if work.system is None else f", after the system prompt “{work.system}”"
    known = {
        "Rounds": f"{work.rounds}, after {work.warm_up} to warm up; each row once a round, in an order drawn "
        "anew for each",
        "Work": f"{images} in one prompt, “{work.prompt}”{system}; {work.max_new_tokens} new tokens, past "
        "the end of an answer too",
        "Rows": "a process each, with weights of its own",
        "Test": "Wilcoxon's signed-rank test on the pairs of each round, 99%; a difference below 2% is none",
        "FLOPs": _convention(report),
        "Processor": f"{machine.processor}, {machine.cores} cores, {in_bytes(machine.memory)} of memory",
        "GPU": machine.gpu,
        "Provider": f"{work.provider}, {work.threads} threads",
        "Energy": machine.energy_counter,
        "Software": ", ".join(f"{n} {v}" for n, v in {**machine.packages, "Python": machine.python}.items()),
        "System": machine.system,
        "Measured": report.created.replace("T", " ").replace("+00:00", " UTC"),
    }
    lines = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in known.items() if v is not None)
    return f"<dl>{''.join(lines)}</dl>"


def _convention(report: BenchReport) -> str | None:
    flops = next((row.flops for row in report.rows if row.flops), None)
    if flops is None:
        return None
    matrices = {"F2": "two", "F3": "three"}[flops.convention]
    return f"{flops.convention}: {matrices} matrices in the MLPs of the decoder; the vision tower's have two"
