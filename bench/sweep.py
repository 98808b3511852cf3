"""A sweep: every combination of methods, ratios and precisions, made once and measured in one run.

The directory of a sweep holds

    sweep.json              the model and the calibration that it belongs to
    bundles/NAME/           a bundle for each method and precision; for a recipe also for each ratio
    answers/HASH.jsonl      the answers to a set of questions
    report.json, report.html

One bundle serves every ratio, except that a recipe is fitted for one. Bundles and answers that are there are
used again: an interrupted sweep continues, and a larger sweep makes only what is new. Times are measured
anew in every run, because only times of one run can be compared.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from visprune.bench.baselines import random_tokens
from visprune.bench.comparison import Comparison, check_work, measure_rows, pytorch_entries
from visprune.bench.entries import Entry, LineUp, entry
from visprune.bench.report.report import BASELINES, NotMade, Role, Workload
from visprune.bench.row_accuracy import row_accuracies
from visprune.bench.sweep_bundles import FLOATS, SweepBundles, is_fitted
from visprune.budget import check_ratio
from visprune.errors import BundleError, ExportError, UnsupportedError, UsageError
from visprune.evaluation.questions import Questions, check
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.find import find
from visprune.outputs import lock, write_file
from visprune.progress import Progress, no_progress
from visprune.pruning.registry import load_method
from visprune.quantize.quantize_options import QuantizeOptions
from visprune.quantize.quantizer import prepare
from visprune.records import sha256
from visprune.runtime.prompts import check_prompt, check_system
from visprune.runtime.samples import read_samples
from visprune.staging import tidy
from visprune.targets import target

__all__ = ["SweepPlan", "sweep"]

_MARKER = "sweep.json"
_ALWAYS = ("none", *BASELINES)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The combinations of a sweep.

    Attributes:
        methods: Pruning methods. `none` (nothing pruned), `random` and `resize` always have rows.
        ratios: Fractions kept, in (0, 1]; for fitprune fractions of the visual work. 1 is the same row for
            all methods.
        precisions: Any of fp32, fp16, int8, int8-dynamic, fp8, int4.
        calibration: Samples to fit recipes and to quantize with; a bundled set for the demo model.

    Raises:
        UsageError: A list is empty, or a method, ratio or precision is unknown or given twice.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    precisions: tuple[str, ...] = ("fp32",)
    calibration: Path | None = None

    def __post_init__(self) -> None:
        for name, given in (("method", self.methods), ("ratio", self.ratios), ("precision", self.precisions)):
            if not given:
                raise UsageError(f"There is no {name} to sweep over.", f"Give some with --{name}s.")
            if len(set(given)) < len(given):
                raise UsageError(f"A {name} is given twice.", "Give each once.")
        for method in self.methods:
            load_method(method)
        for ratio in self.ratios:
            check_ratio(ratio)
        known = (*FLOATS, *target("onnxruntime").quantized)
        for precision in self.precisions:
            if precision not in known:
                raise UsageError(
                    f"There is no precision {precision!r}.", f"Give some of: {', '.join(known)}."
                )

    @property
    def pruned(self) -> tuple[float, ...]:
        """The ratios below 1, the largest first."""
        return tuple(sorted((ratio for ratio in self.ratios if ratio < 1.0), reverse=True))


def sweep(
    model: str | None,
    plan: SweepPlan,
    work: Workload,
    output: Path,
    *,
    questions: Questions | None = None,
    against: str | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Make the bundles that are missing, ask the questions, and measure all rows in one run.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        plan: The combinations.
        work: The work of each row in each round.
        output: The directory of the sweep. An earlier sweep of the same model is continued.
        questions: Asked of every row, for its accuracy. None: accuracy is not measured.
        against: "transformers" to measure the checkpoint in PyTorch too.
        progress: Called as steps go on.

    Raises:
        UsageError: The directory holds something else, or a sweep of another model.
        VispruneError: The model, the work or the questions cannot be used. A combination that cannot be made
            does not stop the sweep; the report names it with the reason.
    """
    checkpoint = find(model)
    _check_calibration(plan, checkpoint)
    check_work(work, against)
    _check_system(work.system, checkpoint)
    if questions is not None:
        check(questions, strict=False)
    with _claimed(output, checkpoint, plan.calibration):
        bundles = SweepBundles(
            model, checkpoint, output / "bundles", plan.precisions, plan.pruned, plan.calibration, progress
        )
        return _measure(bundles, plan, work, output, questions, against, progress)


def _measure(
    bundles: SweepBundles,
    plan: SweepPlan,
    work: Workload,
    output: Path,
    questions: Questions | None,
    against: str | None,
    progress: Progress,
) -> Comparison:
    """Make the missing bundles, ask the questions, and measure; arguments as of `sweep`."""
    rows = LineUp()
    for precision in plan.precisions:
        _add_rows(rows, bundles, plan, precision)
    if not rows.entries:
        raise UnsupportedError(
            rows.not_made[0].reason, "No bundle of the sweep could be made; correct that first."
        )
    check_prompt(work.prompt, rows.entries[0].manifest)
    accuracy = {}
    if questions is None:
        rows.notes.append("Accuracy was not measured: give questions with known answers (--data).")
    else:
        found, notes = row_accuracies(rows.entries, questions, work, output / "answers", progress)
        accuracy = {one.contender.name: mine for one, mine in zip(rows.entries, found, strict=True)}
        rows.notes += notes
    if against is not None:
        rows.entries += pytorch_entries(rows.entries, bundles.checkpoint)
    done = measure_rows(rows, work, progress)
    measured = tuple(replace(row, accuracy=accuracy.get(row.name)) for row in done.report.rows)
    return replace(done, report=replace(done.report, rows=measured))


def _check_calibration(plan: SweepPlan, checkpoint: Checkpoint) -> None:
    """Refuse missing or unreadable samples before anything is made."""
    if plan.calibration is not None:
        read_samples(plan.calibration)
    for precision in plan.precisions:
        if precision not in FLOATS:
            options = QuantizeOptions(precision, calibration=plan.calibration)
            prepare(options, "onnxruntime", "float32", checkpoint.name)


def _check_system(system: str | None, checkpoint: Checkpoint) -> None:
    """Refuse a system prompt that the checkpoint's chat template cannot show, before anything is made."""
    if system is None:
        return
    from visprune.export.checkpoint.loading import load_config
    from visprune.export.checkpoint.processors import load_processor

    processor = load_processor(checkpoint, load_config(checkpoint))
    check_system(system, processor.text, processor.template, checkpoint.name)


@contextlib.contextmanager
def _claimed(output: Path, checkpoint: Checkpoint, calibration: Path | None) -> Iterator[None]:
    """Make the directory, or check that it is an earlier sweep of this model; and lock it meanwhile."""
    marker = output / _MARKER
    facts = {
        "model": checkpoint.name,
        "weights_sha256": checkpoint.weights_sha256(),
        "calibration_sha256": sha256(calibration) if calibration is not None else None,
    }
    if marker.is_file():
        try:
            earlier = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            earlier = None
        if earlier != facts:
            raise UsageError(
                f"{output} is a sweep of another model, or with another calibration.",
                "Choose another directory with -o.",
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not a sweep.", "Choose another directory with -o.")
    try:
        (output / "bundles").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{output} cannot be made: {error.strerror}.", "Choose another directory with -o."
        ) from None
    descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, output)
        write_file(marker, json.dumps(facts, indent=1) + "\n")
        tidy(output / "bundles")
        yield
    finally:
        os.close(descriptor)


def _add_rows(rows: LineUp, bundles: SweepBundles, plan: SweepPlan, precision: str) -> None:
    """Add the rows of one precision."""
    _try(rows, bundles, _Wanted(f"none, {precision}", "none", precision, "unpruned"))
    pruned: list[Entry] = []
    for method in (name for name in plan.methods if name not in _ALWAYS):
        for ratio in plan.pruned:
            wanted = _Wanted(f"{method} {100 * ratio:g}%, {precision}", method, precision, "given", ratio)
            pruned += _try(rows, bundles, wanted)
    if not plan.pruned:
        return
    equal = {random_tokens(one.manifest, one.keep) for one in pruned}
    for method in BASELINES:
        if equal or method in plan.methods:
            _add_baseline(
                rows, bundles, plan, _Wanted(f"{method}, {precision}", method, precision, method), equal
            )


def _add_baseline(
    rows: LineUp, bundles: SweepBundles, plan: SweepPlan, wanted: _Wanted, equal: Set[int]
) -> None:
    """Add the rows of a baseline, at the budgets `equal` of other rows; if asked for, at all ratios too."""
    for one in _try(rows, bundles, wanted):
        rows.entries.remove(one)
        budget = one.manifest.pruning.budget
        asked = plan.pruned if wanted.method in plan.methods else ()
        counts = {budget.at_most(count) for count in equal} | {budget.from_ratio(r) for r in asked}
        for count in sorted(counts, reverse=True):
            share = f"{100 * count / budget.visual_tokens:.3g}%"
            name = f"{wanted.method} {share}, {wanted.precision}"
            contender = replace(one.contender, name=name, keep_tokens=count, ratio=None)
            rows.entries.append(replace(one, contender=contender))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A row to add: its name, and what its bundle must be."""

    name: str
    method: str
    precision: str
    role: Role
    ratio: float = 1.0


def _try(rows: LineUp, bundles: SweepBundles, wanted: _Wanted) -> list[Entry]:
    """Add a row and return it; if its bundle cannot be made, note the reason and return nothing."""
    try:
        bundle = bundles.bundle(wanted.method, wanted.precision, wanted.ratio)
        keeps = {} if is_fitted(wanted.method) else {"ratio": wanted.ratio}
        rows.entries.append(entry(wanted.name, bundle, wanted.role, **keeps))
    except ExportError as error:
        if isinstance(error.__cause__, OSError):  # a full disk: nothing more can be made
            raise
        rows.not_made.append(NotMade(wanted.name, str(error)))
    except (UnsupportedError, UsageError, BundleError) as error:
        rows.not_made.append(NotMade(wanted.name, str(error)))
    else:
        return rows.entries[-1:]
    return []
