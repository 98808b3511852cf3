"""Rates of a machine, fitted to stages that were measured on it.

The byte rate is the median over the decoded tokens. The two FLOP rates are fitted to the vision tower and
the prefill of each row, by least squares of the relative errors. With x seconds for a FLOP of linear layers
and y seconds for a FLOP of attention, the equations are

    (linear x + attention y) / seconds = 1      for each stage
    x = y                                       with a small weight, for stages that cannot tell x from y

A memory-bound stage says nothing about FLOP rates and is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visprune.errors import UsageError
from visprune.estimate.roofline import Rates, StageWork

__all__ = ["Calibration", "Observation", "fit"]

_PRIOR = 0.05  # weight of the equation x = y
_MOSTLY_BYTES = 0.7  # share of a stage's time that moving its bytes may take


@dataclass(frozen=True, slots=True)
class Observation:
    """A stage that was measured: its work, and the seconds that it took."""

    work: StageWork
    seconds: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates that a machine reached, and what was measured for them.

    Attributes:
        machine: Name of the processor or GPU.
        provider: What ran the graphs, such as "cpu" or "cuda".
        threads: Threads of the processor.
        memory: Bytes of the machine's memory, where the processor computed; None for a GPU.
        item_size: Bytes of a floating-point number there.
        rates: Fitted rates, by precision.
        bundles: Names of the bundles that were measured.
        bytes: The most bytes that a measured stage reads and writes.
    """

    machine: str
    provider: str
    threads: int
    memory: int | None
    item_size: int
    rates: dict[str, Rates]
    bundles: tuple[str, ...]
    bytes: int

    def describe(self) -> str:
        """Return a text for people, such as 'none, fopru on a Xeon (cpu, 2 threads)'."""
        where = f"{self.provider}, {self.threads} threads" if self.provider == "cpu" else self.provider
        return f"{', '.join(self.bundles)} on {self.machine} ({where})"


def fit(observations: Sequence[Observation]) -> Rates:
    """Return the rates that explain the measured times best.

    Raises:
        UsageError: There is no decoded token, or no compute-bound stage.
    """
    decoded = [o.work.bytes / o.seconds for o in observations if o.work.stage == "decode"]
    if not decoded:
        raise UsageError(
            "Nothing of the calibration says how fast memory is.", "Measure a bundle that decodes."
        )
    bytes_rate = statistics.median(decoded)
    busy = [
        o
        for o in observations
        if o.work.stage in ("vision", "prefill") and o.work.bytes / bytes_rate < _MOSTLY_BYTES * o.seconds
    ]
    if not busy:
        raise UsageError(
            "Every stage of the calibration is memory-bound, so it does not say how fast products are.",
            "Measure a larger model or more tokens.",
        )
    linear, attention = _flop_times(busy)
    return Rates(1 / linear, 1 / attention, bytes_rate)


def _flop_times(busy: Sequence[Observation]) -> tuple[float, float]:
    """Return the seconds of a FLOP in linear layers and in attention.

    Both are positive. Where least squares gives one that is not, the two get the same value.
    """
    rows = np.array([(o.work.linear / o.seconds, o.work.attention / o.seconds) for o in busy])
    prior = _PRIOR * rows.sum(axis=1).mean() * np.array([[1.0, -1.0]])
    ones = np.append(np.ones(len(rows)), 0.0)
    linear, attention = np.linalg.lstsq(np.concatenate([rows, prior]), ones, rcond=None)[0]
    if min(linear, attention) > 0:
        return float(linear), float(attention)
    alike = 1 / float(rows.sum(axis=1).mean())
    return alike, alike
