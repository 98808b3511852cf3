"""A comparison of bundles: latency, memory and work, beside an unpruned row and the rows of baselines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visprune.bench.entries import Entry, LineUp
from visprune.bench.lineup import line_up
from visprune.bench.make_bundle import chat_template, checkpoint_of, export_variant
from visprune.bench.measure.measure import measure
from visprune.bench.measure.protocol import Contender
from visprune.bench.report.report import BenchReport, Workload
from visprune.bench.rows import report_of
from visprune.bundle import Bundle
from visprune.cores import processor_flags
from visprune.errors import UnsupportedError, UsageError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.progress import Progress, no_progress
from visprune.runtime.backends import ENGINES
from visprune.runtime.prompts import check_prompt
from visprune.runtime.reading import check_texts
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.sources import absolute
from visprune.verified import verify

__all__ = ["Comparison", "check_work", "compare", "measure_rows", "pytorch_entries"]

_BF16 = ("avx512_bf16", "amx_bf16", " bf16", "sve")  # without one of these, bfloat16 is emulated


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        report: The report.
        overlays: By the names of the rows, the overlay of each image, JPEG in base64.
    """

    report: BenchReport
    overlays: dict[str, tuple[str, ...]]


def compare(
    bundles: Sequence[str | Path],
    work: Workload,
    *,
    against: str | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Measure bundles in one run of several rounds, each bundle in its own process.

    An unpruned row, and rows of random tokens and of smaller pictures at the same budgets, are added if none
    is given. Bundles that are missing for this are exported into a temporary directory, if their checkpoint
    can be found.

    Args:
        bundles: Their directories. The same one may come twice.
        work: The work of each row in each round.
        against: "transformers" to measure the same work in PyTorch too, on the CPU.
        progress: Called as steps go on.

    Raises:
        UsageError: There is no bundle, or the provider or `against` is unknown.
        UnsupportedError: PyTorch is wanted, and the provider is not the CPU.
        BundleError: A bundle cannot be used.
        InputError: An image, the prompt or the system prompt cannot be used.
        MissingExtraError: The provider's package is missing or, for PyTorch, the `export` extra.
    """
    if not bundles:
        raise UsageError("There is no bundle to measure.", "Give one or more, or --sweep.")
    check_work(work, against)
    opened = [Bundle.open(path) for path in bundles]
    for bundle in opened:
        check_prompt(work.prompt, bundle.manifest)
        check_texts(bundle, system=work.system)
        if against is not None:
            checkpoint_of(bundle.manifest)
    for bundle in opened:
        verify(bundle, lambda name, _: progress(f"checking {name}", 0, 1))
    with tempfile.TemporaryDirectory(prefix="visprune-bench-") as folder:
        engines = work.provider in ENGINES
        found = line_up(
            opened,
            lambda bundle, method: export_variant(bundle, method, Path(folder), progress, engines=engines),
        )
        if against is not None:
            found.entries += pytorch_entries(found.entries)
        return measure_rows(found, work, progress)


def check_work(work: Workload, against: str | None) -> None:
    """Refuse work that no row could run, before anything is loaded or made.

    Raises:
        UsageError, UnsupportedError, InputError: As for `compare`.
    """
    from visprune.runtime.backends import backend

    if against not in (None, "transformers"):
        raise UsageError(f"Bundles cannot be compared with {against!r}.", "Use --against transformers.")
    if against is not None and work.provider != "cpu":
        raise UnsupportedError(
            f"PyTorch is measured on the CPU only, and the provider is {work.provider!r}.",
            "Leave --against out, or use the provider cpu.",
        )
    if against is not None and work.cached:
        raise UnsupportedError(
            "PyTorch keeps no features of images, and --cached measures with those kept.",
            "Leave one of --against and --cached out.",
        )
    backend(work.provider)
    for image in work.images:
        decode(image)


def pytorch_entries(entries: Sequence[Entry], checkpoint: Checkpoint | None = None) -> list[Entry]:
    """Return rows of PyTorch for each model: in float32, and in bfloat16 if the processor computes in it.

    Args:
        entries: The rows of bundles, whose models are wanted.
        checkpoint: Their checkpoint, if it is known.

    Raises:
        CheckpointError: A checkpoint cannot be found.
    """
    models = {one.manifest.source.weights_sha256: one for one in entries}
    found = []
    for one in models.values():
        of = checkpoint_of(one.manifest)[1] if checkpoint is None else checkpoint
        prefix = f"{one.manifest.source.model} in " if len(models) > 1 else ""
        first = Contender(
            f"{prefix}transformers, fp32",
            "pytorch",
            str(of.path.resolve()),
            dtype="float32",
            chat_template=chat_template(Bundle(Path(one.contender.path), one.manifest)),
            adapters=_directories(of, "adapter"),
            vision_tower=next(iter(_directories(of, "vision tower")), None),
        )
        contenders = [first]
        if _computes_bf16():
            contenders.append(replace(first, name=f"{prefix}transformers, bf16", dtype="bfloat16"))
        found += [replace(one, contender=contender) for contender in contenders]
    return found


def _directories(checkpoint: Checkpoint, role: str) -> tuple[str, ...]:
    """Return the directories of a checkpoint's parts, without those that lie beside its own weights."""
    found = [part.files[0].parent for part in checkpoint.parts if part.role == role]
    return tuple(str(folder.resolve()) for folder in found if folder != checkpoint.path)


def measure_rows(rows: LineUp, work: Workload, progress: Progress) -> Comparison:
    """Measure rows, and return the report."""
    images = tuple(map(absolute, work.images))
    measured = measure([one.contender for one in rows.entries], replace(work, images=images), progress)
    overlays = {timed.contender.name: timed.overlays for timed in measured.rows}
    return Comparison(report_of(rows, measured, work), overlays)


def _computes_bf16() -> bool:
    flags = f" {' '.join(processor_flags())} "
    return any(name in flags for name in _BF16)
