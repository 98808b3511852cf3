"""The texts around the figures of a page: the large numbers at its top, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visprune.bench.report.formatting import kept_tokens, percent
from visprune.bench.report.report import BenchReport, Row
from visprune.units import in_bytes

__all__ = ["Fact", "facts", "method"]


@dataclass(frozen=True, slots=True)
class Fact:
    """A large number at the top of a page.

    Attributes:
        value: The number with its unit.
        meaning: A phrase that continues the number, such as 'of the prefill's FLOPs removed'.
    """

    value: str
    meaning: str


def facts(report: BenchReport) -> list[Fact]:
    """Return the numbers for the top of a page. Those that were not measured are left out."""
    rows = [row for row in report.rows if row.role == "given"]
    return [*_speed(report, rows), *_fewest(report, rows), *_work(rows)]


def _speed(report: BenchReport, rows: Sequence[Row]) -> Iterator[Fact]:
    pairs = [(row, full) for row in rows if (full := report.unpruned(row)) is not None]
    different = [(found.ratio, row) for row, full in pairs if (found := row.against(full)).told]
    ratio, row = min(different, key=lambda one: one[0], default=(1.0, None))
    if row is not None and ratio < 1.0:
        yield Fact(f"{1 / ratio:.2g}x", f"faster to the first token than unpruned, at best: {row.name}")


def _fewest(report: BenchReport, rows: Sequence[Row]) -> Iterator[Fact]:
    full = next((row.accuracy for row in report.rows if row.role == "unpruned" and row.accuracy), None)
    if full is None:
        return
    close = [row for row in rows if row.accuracy and row.accuracy.share >= full.low]
    if close:
        least = min(close, key=lambda row: row.kept)
        yield Fact(
            kept_tokens(least),
            f"visual tokens are the fewest with an accuracy within the 95% interval of the unpruned row: "
            f"{least.name}",
        )


def _work(rows: Sequence[Row]) -> Iterator[Fact]:
    removed = [(row.flops.removed, row) for row in rows if row.flops]
    if removed:
        most, row = max(removed, key=lambda one: one[0])
        yield Fact(percent(most), f"of the prefill's FLOPs removed, at most: {row.name}")
    realised = sorted(row.realised for row in rows if row.realised is not None)
    if realised:
        middle = realised[len(realised) // 2]
        yield Fact(percent(middle), "of the saving in FLOPs is a saving in time too: the median of the rows")


def method(report: BenchReport) -> dict[str, str]:
    """Return how and where it was measured, as topics with their texts."""
    work, machine = report.work, report.machine
    images = "1 image" if len(work.images) == 1 else f"{len(work.images)} images"
    system = "" if work.system is None else f", after the system prompt “{work.system}”"
    known = {
        "Rounds": f"{work.rounds}, after {work.warm_up} warm-up rounds; each row once a round, in an order "
        "drawn anew for each",
        "Work": f"{images} in one prompt, “{work.prompt}”{system}; {work.max_new_tokens} new tokens, past "
        "the end of an answer too",
        "Image": "encoded in the warm-up rounds; the times are those of a second question"
        if work.cached
        else None,
        "Rows": "each in a process of its own, with its own copy of the weights",
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
    return {topic: text for topic, text in known.items() if text is not None}


def _convention(report: BenchReport) -> str | None:
    flops = next((row.flops for row in report.rows if row.flops), None)
    if flops is None:
        return None
    matrices = {"F2": "two", "F3": "three"}[flops.convention]
    return f"{flops.convention}: {matrices} matrices in the MLPs of the decoder; the vision tower's have two"
