"""Figures of a report for people, the same in a terminal and on a page."""

from __future__ import annotations

from visprune.bench.report.report import Row, is_prefill
from visprune.bench.report.statistics import Difference, Summary

__all__ = [
    "ACCURACY",
    "STAGES",
    "gflop",
    "in_bytes",
    "milliseconds",
    "share",
    "stages",
    "times",
    "tokens",
]

ACCURACY = "right, with the 95% interval"

STAGES = ("preprocess", "vision", "prune", "embed", "prefill", "other")
"""Of the time to the first token, in their order; the prefill is of all segments."""

_GRAPHS = {
    "preprocess": "preprocess",
    "vision_encoder": "vision",
    "token_pruner": "prune",
    "embedding": "embed",
}


def milliseconds(value: float) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def in_bytes(count: int | None) -> str:
    """In decimal units."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def gflop(count: int) -> str:
    """In GFLOP."""
    return f"{count / 1e9:.3g}" if count < 1e12 else f"{count / 1e9:,.0f}"


def share(value: float | None) -> str:
    """In percent; a dash where there is none."""
    return "-" if value is None else f"{value:.0%}"


def tokens(row: Row) -> str:
    """Visual tokens in the layers of the LLM, and how many there were."""
    return f"{row.kept:.3g} of {row.visual_tokens}"


def times(found: Difference) -> str:
    """Such as '0.54x (0.52 to 0.57)'."""
    if found.low is None or found.high is None:
        return "too few rounds"
    if not found.told:
        return f"no difference ({found.low:.2f} to {found.high:.2f})"
    return f"{found.ratio:.2f}x ({found.low:.2f} to {found.high:.2f})"


def stages(row: Row) -> dict[str, float]:
    """Median milliseconds of each of `STAGES`; parts of the prefill are added up in each repetition."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    for one in row.repetitions:
        spent = dict.fromkeys(STAGES, 0.0)
        for name, ms in one.stages.items():
            spent["prefill" if is_prefill(name) else _GRAPHS.get(name, "other")] += ms
        for name, ms in spent.items():
            found[name].append(ms)
    return {name: Summary.of(values).median for name, values in found.items()}
