"""Calibration from a report of `visprune-bench`: the rates of a machine, fitted to measured times."""

from __future__ import annotations

import statistics
from pathlib import Path

from visprune.bench.report.report import BenchReport, Row, is_prefill, read_report
from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError
from visprune.estimate.measured_rates import Calibration, Observation, fit
from visprune.estimate.planned_model import PrunedModel, bundle_model
from visprune.estimate.roofline import PRECISIONS, StageWork, stage_works
from visprune.estimate.token_schedule import Schedule, TokenCounts

__all__ = ["read_calibration"]


def read_calibration(path: str | Path) -> Calibration:
    """Read the JSON of `visprune-bench`, and the shapes of its bundles, which must be where they were.

    Raises:
        UsageError: The file cannot be read, or has no row of a known precision.
        BundleError: A bundle that the report names is gone or broken.
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
        if row.role != "given" and not Path(row.path).exists():
            continue  # exported for the comparison, and not kept
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
    """Return the median times of one row for the vision tower, the prefill and one decoded token."""
    try:
        manifest = Bundle.open(Path(row.path)).manifest
    except BundleError as error:
        raise BundleError(
            f"The shapes of {row.name} are read from its bundle: {error.what}",
            "Keep the bundles of a calibration where they were measured.",
        ) from None
    model = bundle_model(manifest, row.name)
    tokens = _tokens(model, row, len(report.work.images))
    spent = {
        "vision": [one.stages.get("vision_encoder", 0.0) for one in row.repetitions],
        "prefill": [
            sum(ms for name, ms in one.stages.items() if is_prefill(name)) for one in row.repetitions
        ],
        "decode": [one.per_token for one in row.repetitions],
    }
    if model.tiling is not None or model.pruning.resizes:
        del spent["vision"]  # how many tiles or patches the tower saw is not in the report
    found = stage_works(model.sizes, tokens, row.new_tokens, row.precision, item_size)
    done: dict[str, StageWork] = {work.stage: work for work in found}
    return [Observation(done[stage], statistics.median(ms) / 1e3) for stage, ms in spent.items()]


def _tokens(model: PrunedModel, row: Row, images: int) -> TokenCounts:
    """The tokens of a row as they were."""
    entering = tuple(count + row.text_tokens for count in row.layer_tokens)
    early = model.inside is not None and model.inside.boundary == "attention"
    staying = (*entering[1:], entering[-1]) if early else entering
    return TokenCounts(images, row.layer_tokens[0], entering[0], Schedule(entering, staying))
