"""Rates of a machine from what `visprune-bench` measured on it.

The byte rate is the median over the decoded tokens. The two FLOP rates are fitted to the vision tower and
the prefill of each row by least squares of the relative errors: with x seconds for a FLOP of linear layers
and y for one of attention,

    (linear x + attention y) / seconds = 1      for each stage
    x = y                                        with a small weight, where stages do not tell them apart

A stage that waits for bytes says nothing of FLOPs and is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visprune.bench.report.report import BenchReport, Row, is_prefill, read_report
from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError
from visprune.estimate.flops import Schedule, TokenCounts
from visprune.estimate.planned_model import Subject, of_bundle
from visprune.estimate.roofline import PRECISIONS, Rates, Work, works

__all__ = ["Calibration", "Observation", "fit", "read_calibration"]

_PRIOR = 0.05
_MOSTLY_BYTES = 0.7


@dataclass(frozen=True, slots=True)
class Observation:
    """A stage that was measured: what it did, and seconds."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a machine reached.

    Attributes:
        machine: Its processor, or GPU.
        provider: What ran the graphs.
        threads: Of the processor.
        memory: Bytes of it, where the processor computed; None for a GPU.
        item_size: Bytes of a float there.
        rates: By precision.
        bundles: Names of what was measured.
        bytes: Most that a stage of theirs reads and writes.
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
        """Such as 'none, fopru on a Xeon (cpu, 2 threads)'."""
        where = f"{self.provider}, {self.threads} threads" if self.provider == "cpu" else self.provider
        return f"{', '.join(self.bundles)} on {self.machine} ({where})"


def read_calibration(path: str | Path) -> Calibration:
    """Read the JSON of `visprune-bench`; the bundles it names must be where they were, for their shapes.

    Raises:
        UsageError: It cannot be read, or says too little.
        BundleError: A bundle of it is gone or broken.
    """
    report = read_report(path)
    on_cpu = report.work.provider == "cpu"
    item_size = 4 if on_cpu else 2
    found: dict[str, list[Observation]] = {}
    names, heaviest = [], 0
    for row in report.rows:
        # On a CPU, ONNX Runtime computes fp16 bundles in fp32.
        if row.role == "pytorch" or row.precision not in PRECISIONS or (on_cpu and row.precision == "fp16"):
            continue
        seen = _observations(row, report, item_size)
        found.setdefault(row.precision, []).extend(seen)
        heaviest = max(heaviest, *(o.work.bytes for o in seen))
        names.append(row.name)
    if not found:
        raise UsageError(
            f"{path} has no row of one of: {', '.join(PRECISIONS)}.", "Measure a bundle with visprune-bench."
        )
    return Calibration(
        machine=report.machine.processor if on_cpu else report.machine.gpu or "a GPU without a name",
        provider=report.work.provider,
        threads=report.work.threads,
        memory=report.machine.memory if on_cpu else None,
        item_size=item_size,
        rates={precision: fit(seen) for precision, seen in found.items()},
        bundles=tuple(names),
        bytes=heaviest,
    )


def _observations(row: Row, report: BenchReport, item_size: int) -> list[Observation]:
    """The vision tower, the prefill and a token of one row; medians over its repetitions."""
    try:
        manifest = Bundle.open(Path(row.path)).manifest
    except BundleError as error:
        raise BundleError(
            f"The shapes of {row.name} are read from its bundle: {error.what}",
            "Keep the bundles of a calibration where they were measured.",
        ) from None
    subject = of_bundle(manifest, row.name)
    tokens = _tokens(subject, row, len(report.work.images))
    spent = {
        "vision": [one.stages.get("vision_encoder", 0.0) for one in row.repetitions],
        "prefill": [
            sum(ms for name, ms in one.stages.items() if is_prefill(name)) for one in row.repetitions
        ],
        "decode": [one.per_token for one in row.repetitions],
    }
    if subject.tiling is not None:
        del spent["vision"]  # how many tiles the pictures had is not in the report
    found = works(subject, tokens, row.new_tokens, row.precision, item_size)
    done: dict[str, Work] = {work.stage: work for work in found}
    return [Observation(done[stage], statistics.median(ms) / 1e3) for stage, ms in spent.items()]


def _tokens(subject: Subject, row: Row, images: int) -> TokenCounts:
    """The tokens of a row as they were."""
    entering = tuple(count + row.text_tokens for count in row.layer_tokens)
    early = subject.inside is not None and subject.inside.boundary == "attention"
    staying = (*entering[1:], entering[-1]) if early else entering
    return TokenCounts(images, row.layer_tokens[0], entering[0], Schedule(entering, staying))


def fit(observations: Sequence[Observation]) -> Rates:
    """The rates that explain what was measured best.

    Raises:
        UsageError: There is no decoded token, or no stage that waits for FLOPs.
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
            "Every stage of the calibration waits for memory, so it does not say how fast products are.",
            "Measure a larger model or more tokens.",
        )
    linear, attention = _flop_times(busy)
    return Rates(1 / linear, 1 / attention, bytes_rate)


def _flop_times(busy: Sequence[Observation]) -> tuple[float, float]:
    """Seconds of a FLOP in linear layers and in attention, both positive."""
    rows = np.array([(o.work.linear / o.seconds, o.work.attention / o.seconds) for o in busy])
    prior = _PRIOR * rows.sum(axis=1).mean() * np.array([[1.0, -1.0]])
    ones = np.append(np.ones(len(rows)), 0.0)
    linear, attention = np.linalg.lstsq(np.concatenate([rows, prior]), ones, rcond=None)[0]
    if min(linear, attention) > 0:
        return float(linear), float(attention)
    alike = 1 / float(rows.sum(axis=1).mean())
    return alike, alike
