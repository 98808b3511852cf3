"""Bundles side by side: latency, memory and work, with what they are to be compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visprune.bench.lineup import Entry, LineUp, line_up
from visprune.bench.make_bundle import chat_template, checkpoint_of, make
from visprune.bench.measure.measure import measure
from visprune.bench.measure.protocol import Contender
from visprune.bench.report.report import BenchReport, Work
from visprune.bench.rows import report_of
from visprune.bundle import Bundle
from visprune.cores import processor_flags
from visprune.errors import UnsupportedError, UsageError
from visprune.progress import Progress, no_progress
from visprune.runtime.backends import ENGINES
from visprune.runtime.prompts import check_prompt
from visprune.runtime.reading import check_texts
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.sources import resolved
from visprune.verified import verify

__all__ = ["Comparison", "check_work", "compare", "in_pytorch", "run"]

_BF16 = ("avx512_bf16", "amx_bf16", " bf16", "sve")  # without it bfloat16 is emulated


@dataclass(frozen=True, slots=True)
class Comparison:
    """A report, and for each row the overlays of the images: JPEG in base64."""

    report: BenchReport
    pictures: dict[str, tuple[str, ...]]


def compare(
    bundles: Sequence[str | Path], work: Work, *, against: str | None = None, progress: Progress | None = None
) -> Comparison:
    """Measure bundles in one run, each in a process of its own, in rounds.

    A row with nothing pruned and rows of random tokens at the same budgets are added where none is given;
    what is missing for that is exported into a temporary directory, if its checkpoint can be found.

    Args:
        bundles: Their directories. The same one may come twice.
        work: What each does in each round.
        against: "transformers" for the same work in PyTorch, on the CPU.
        progress: Called as it goes on.

    Raises:
        UsageError: Nothing to compare, or something there is not.
        UnsupportedError: PyTorch is asked for beside another provider than the CPU.
        BundleError: A bundle that cannot be used.
        InputError: A picture, a prompt or a system prompt that cannot be used.
        MissingExtraError: The provider's package is missing; for PyTorch, the `export` extra.
    """
    report = progress or no_progress
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
        verify(bundle, lambda name, _: report(f"checking {name}", 0, 1))
    with tempfile.TemporaryDirectory(prefix="visprune-bench-") as folder:
        engines = work.provider in ENGINES
        found = line_up(
            opened, lambda bundle, method: make(bundle, method, Path(folder), report, engines=engines)
        )
        if against is not None:
            found.entries += in_pytorch(found.entries)
        return run(found, work, report)


def check_work(work: Work, against: str | None) -> None:
    """Refuse what no row could run, before anything is loaded or made.

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
    backend(work.provider)
    for image in work.images:
        decode(image)


def in_pytorch(entries: Sequence[Entry], place: Path | None = None) -> list[Entry]:
    """Each model of some rows in PyTorch: float32, and bfloat16 where the processor computes in it.

    Args:
        entries: The rows.
        place: Directory of their checkpoint, where it is known.

    Raises:
        CheckpointError: A checkpoint cannot be found.
    """
    models = {one.manifest.source.weights_sha256: one for one in entries}
    found = []
    for one in models.values():
        folder = checkpoint_of(one.manifest)[1].path if place is None else place
        prefix = f"{one.manifest.source.model} in " if len(models) > 1 else ""
        path = str(folder.resolve())
        template = chat_template(Bundle(Path(one.contender.path), one.manifest))
        first = Contender(
            f"{prefix}transformers, fp32", "pytorch", path, dtype="float32", chat_template=template
        )
        contenders = [first]
        if _computes_bf16():
            contenders.append(replace(first, name=f"{prefix}transformers, bf16", dtype="bfloat16"))
        found += [replace(one, contender=contender) for contender in contenders]
    return found


def run(rows: LineUp, work: Work, progress: Progress) -> Comparison:
    """Measure rows and report."""
    images = tuple(map(resolved, work.images))
    measured = measure([one.contender for one in rows.entries], replace(work, images=images), progress)
    pictures = {timed.contender.name: timed.pictures for timed in measured.rows}
    return Comparison(report_of(rows, measured, work), pictures)


def _computes_bf16() -> bool:
    flags = f" {' '.join(processor_flags())} "
    return any(name in flags for name in _BF16)
