"""The rows of a report, made of what was measured."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from visprune.bench.entries import Entry, LineUp, method_of, precision_of
from visprune.bench.measure.measure import Measured, Timed
from visprune.bench.measure.protocol import Contender, Done
from visprune.bench.report.report import SCHEMA_VERSION, BenchReport, Flops, Machine, Row, Workload
from visprune.cores import processor_name, total_memory, usable_cores
from visprune.estimate.flops import savings
from visprune.version import __version__

__all__ = ["report_of"]

_WIDE = 0.25  # spread, as a share of the median, from which on a note warns
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "transformers")


def report_of(line_up: LineUp, measured: Measured, work: Workload) -> BenchReport:
    """Return the report of a measurement.

    Args:
        line_up: The rows that were measured, in the same order.
        measured: The measurements.
        work: The work of each row.
    """
    rows = [_row(one, timed, work) for one, timed in zip(line_up.entries, measured.rows, strict=True)]
    report = BenchReport(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(measured, rows),
        work=work,
        rows=tuple(rows),
        not_made=tuple(line_up.not_made),
    )
    report = replace(report, rows=tuple(replace(row, realised=_realised(report, row)) for row in rows))
    return replace(report, notes=(*line_up.notes, *_notes(report, line_up)))


def _row(one: Entry, timed: Timed, work: Workload) -> Row:
    manifest, contender, last = one.manifest, one.contender, timed.last
    in_pytorch = contender.dtype is not None
    if last is None:
        raise ValueError(f"{contender.name} was not run")
    return Row(
        name=contender.name,
        role=contender.role,
        path=contender.path,
        model=manifest.source.model,
        weights=manifest.source.weights_sha256,
        method="none" if in_pytorch else method_of(manifest),
        precision=_DTYPES[contender.dtype] if contender.dtype else precision_of(manifest),
        visual_tokens=last.visual_tokens,
        layer_tokens=last.layer_tokens,
        text_tokens=last.text_tokens,
        new_tokens=last.new_tokens,
        disk_bytes=_weight_bytes(contender) if in_pytorch else _bundle_bytes(one),
        load=timed.load,
        memory_bytes=last.memory_bytes,
        device_bytes=timed.device_bytes,
        cache_bytes=last.cache_bytes,
        flops=_flops(one, last, len(work.images)),
        repetitions=tuple(timed.repetitions),
    )


def _bundle_bytes(one: Entry) -> int:
    return sum(record.size for record in one.manifest.files.values())


def _weight_bytes(contender: Contender) -> int:
    """Return the bytes of the weights of a checkpoint, its vision tower and its adapters."""
    parts = [contender.vision_tower] if contender.vision_tower else []
    files: list[Path] = []
    for folder in map(Path, (contender.path, *parts, *contender.adapters)):
        files += list(folder.glob("*.safetensors")) or list(folder.glob("*_model*.bin"))
    return sum(file.stat().st_size for file in files)


def _flops(one: Entry, last: Done, images: int) -> Flops | None:
    keep = one.keep
    found = savings(
        one.manifest,
        images=images,
        text_tokens=last.text_tokens,
        keep_tokens=keep.tokens,
        layer_ratio=keep.layer_ratio,
        unit="FLOP",
    )
    if found is None:
        return None
    sequence, model = found.sequence, found.model
    if one.contender.dtype is not None:  # in PyTorch nothing is pruned, whatever the manifest says
        sequence, model = replace(sequence, pruned=sequence.unpruned), replace(model, pruned=model.unpruned)
    return Flops(found.convention, sequence.pruned, model.pruned, sequence.unpruned, model.unpruned)


def _realised(report: BenchReport, row: Row) -> float | None:
    """Return the share of time that pruning saves, divided by the share of work that it removes."""
    full = report.unpruned(row)
    if report.work.cached:  # the FLOPs are those of a first question
        return None
    if full is None or full is row or row.flops is None or row.role == "pytorch" or row.flops.removed <= 0.0:
        return None
    return (1.0 - row.against(full).ratio) / row.flops.removed


def _notes(report: BenchReport, line_up: LineUp) -> list[str]:
    notes = []
    wide = [row.name for row in report.rows if row.first_token.spread > _WIDE]
    if wide:
        notes.append(
            f"The spread is wide (more than {_WIDE:.0%} of the median) for {', '.join(wide)}: something else "
            "was running, or more rounds are needed."
        )
    if any(one.manifest.tiling is not None for one in line_up.entries):
        notes.append("FLOPs are for images that fill the largest grid of tiles; times are for those given.")
    return notes


def _machine(measured: Measured, rows: Sequence[Row]) -> Machine:
    packages = {"visprune": __version__}
    for name in _PACKAGES:
        if name in ("torch", "transformers") and not any(row.role == "pytorch" for row in rows):
            continue
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        cores=usable_cores(),
        memory=total_memory(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=".".join(map(str, sys.version_info[:3])),
        packages=packages,
        gpu=measured.gpu,
        energy_counter=measured.energy_counter,
    )


def _processor() -> str:
    """Return the name of the board or, if it has none, of the processor."""
    board = Path("/proc/device-tree/model")
    if board.is_file():
        return board.read_text(encoding="utf-8").strip("\0\n ")
    return processor_name()
