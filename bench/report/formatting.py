"""Numbers of a report as text for people, the same in a terminal and on a page."""

from __future__ import annotations

from visprune.bench.report.report import Row, is_prefill
from visprune.bench.report.statistics import Difference, Summary

__all__ = [
    "STAGES",
    "accuracy",
    "gflop",
    "in_bytes",
    "kept_tokens",
    "milliseconds",
    "percent",
    "ratio",
    "stage_medians",
]

STAGES = ("preprocess", "vision", "prune", "embed", "prefill", "other")
"""Stages of the time to the first token, in their order. The prefill is the sum of all segments."""

_GRAPHS = {
    "preprocess": "preprocess",
    "vision_encoder": "vision",
    "token_pruner": "prune",
    "embedding": "embed",
}


def milliseconds(value: float) -> str:
    """Format milliseconds with three digits: 0.123, 1.23, 12.3, 123."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def in_bytes(count: int | None) -> str:
    """Format a number of bytes in decimal units; None is a dash."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def gflop(count: int) -> str:
    """Format a number of floating-point operations in units of 10^9, without the unit."""
    return f"{count / 1e9:.3g}" if count < 1e12 else f"{count / 1e9:,.0f}"


def percent(share: float | None) -> str:
    """Format a share, such as 0.5, as a percentage; None is a dash."""
    return "-" if share is None else f"{share:.0%}"


def accuracy(row: Row) -> str:
    """Format the share of right answers with its 95% interval; a dash if it was not measured."""
    found = row.accuracy
    return f"{found.share:.1%} ({found.low:.1%} to {found.high:.1%})" if found else "-"


def kept_tokens(row: Row) -> str:
    """Format the visual tokens in the layers of the LLM (their mean), and how many there were."""
    return f"{row.kept:.3g} of {row.visual_tokens}"


def ratio(found: Difference) -> str:
    """Format a ratio of times with its interval, such as '0.54x (0.52 to 0.57)'."""
    if found.low is None or found.high is None:
        return "too few rounds"
    if not found.told:
        return f"no difference ({found.low:.2f} to {found.high:.2f})"
    return f"{found.ratio:.2f}x ({found.low:.2f} to {found.high:.2f})"


def stage_medians(row: Row) -> dict[str, float]:
    """Return the median milliseconds of each of `STAGES`.

    A report has a time for each graph. Graphs of one stage are added up within each repetition, before the
    median is taken.
    """
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    for one in row.repetitions:
        spent = dict.fromkeys(STAGES, 0.0)
        for name, ms in one.stages.items():
            spent["prefill" if is_prefill(name) else _GRAPHS.get(name, "other")] += ms
        for name, ms in spent.items():
            found[name].append(ms)
    return {name: Summary.of(values).median for name, values in found.items()}
