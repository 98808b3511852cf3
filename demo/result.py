"""The results of the demo's table: its text, and which method loses to which baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visprune.evaluation.intervals import Interval, paired, wilson

__all__ = ["BASELINES", "Loss", "Result", "loss_lines", "losses", "table"]

BASELINES = ("random", "resize")


@dataclass(frozen=True, slots=True)
class Result:
    """Exact match of one method at one count.

    Attributes:
        method: Name in the table.
        count: Visual tokens that were asked for; the column.
        kept: Visual tokens kept. For a method inside the LLM: those that enter each layer.
        work: Share of the decoder's work on visual tokens that is left (F3).
        right: Whether each question was answered right.
        seconds: Time that the measurement took.
    """

    method: str
    count: int
    kept: str
    work: float
    right: tuple[bool, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A method that is certainly worse than a baseline at the same count.

    Attributes:
        method: Name in the table.
        count: The column.
        kept: Visual tokens that the method kept.
        baseline: Name of the baseline.
        difference: Exact match of the method minus that of the baseline, over the same questions.
        interval: Its 95% interval, which is below 0.
    """

    method: str
    count: int
    kept: str
    baseline: str
    difference: float
    interval: Interval


def losses(results: Sequence[Result]) -> list[Loss]:
    """Return where a method loses to a baseline: where the interval of the paired difference is below 0."""
    found = {(result.method, result.count): result for result in results}
    lost = []
    for result in results:
        for baseline in BASELINES:
            other = found.get((baseline, result.count))
            if other is None or result.method == baseline:
                continue
            pairs = list(zip(result.right, other.right, strict=True))
            up, down = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
            interval = paired(up, down, len(pairs))
            if interval[1] < 0:
                difference = (up - down) / len(pairs)
                lost.append(Loss(result.method, result.count, result.kept, baseline, difference, interval))
    return lost


def loss_lines(results: Sequence[Result]) -> str:
    """Return the losses in Markdown, one line each."""
    measured = {result.method for result in results}
    lines = []
    for baseline in (name for name in BASELINES if name in measured):
        lost = [loss for loss in losses(results) if loss.baseline == baseline]
        lines.append(
            f"Loses to `{baseline}` (difference in points, 95% interval):{'' if lost else ' nothing.'}"
        )
        lines += ["", *map(_line, lost), ""] if lost else [""]
    return "\n".join(lines)


def _line(loss: Loss) -> str:
    low, high = (100 * end for end in loss.interval)
    kept = "" if loss.kept == str(loss.count) else f" ({loss.kept})"
    return (
        f"- {loss.method} at {loss.count} tokens{kept}: {100 * loss.difference:.1f} ({low:.1f} to {high:.1f})"
    )


def table(results: Sequence[Result]) -> str:
    """Return the results in Markdown, with a row for each method and a column for each count."""
    found = {(result.method, result.count): result for result in results}
    none = next(result for result in results if result.method == "none")
    counts = list(dict.fromkeys(result.count for result in results if result is not none))
    methods = list(dict.fromkeys(result.method for result in results if result is not none))
    lines = [
        "| method | " + " | ".join(f"{count} tokens" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for method in methods:
        cells = [_cell(found.get((method, count))) for count in counts]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", f"Unpruned: {_cell(none)}; {len(none.right)} questions."]
    return "\n".join(lines) + "\n"


def _cell(result: Result | None) -> str:
    if result is None:
        return "cannot be reached"
    right, of = sum(result.right), len(result.right)
    low, high = wilson(right, of)
    return f"{right / of:.3f} ({low:.3f} to {high:.3f}); {result.kept}; {100 * result.work:.0f}%"
