"""Methods by ratios by precisions: every combination made once, measured in one run, shown in one table.

The directory of a sweep holds

    sweep.json          which model it is of
    bundles/NAME/       a bundle for each method and precision, and for each ratio of a recipe
    accuracy/ROW.json   right answers that were counted
    report.json, report.html

One bundle serves every ratio, except where a recipe is fitted for one. What is there and whole is used again,
so an interrupted sweep goes on where it was, and a larger one makes only what is new; times are measured anew
in each run, because only times of one run can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visprune.bench.accuracy import QUESTIONS, demo_accuracy
from visprune.bench.comparison import Comparison, check_work, in_pytorch, run
from visprune.bench.lineup import Entry, LineUp, entry, random_tokens
from visprune.bench.report.report import NotMade, Role, Workload
from visprune.budget import check_ratio
from visprune.bundle import Bundle
from visprune.bundled import DEMO
from visprune.errors import BundleError, ExportError, UnsupportedError, UsageError, VispruneError
from visprune.export.checkpoint.checkpoint import Checkpoint, find
from visprune.outputs import write_file
from visprune.progress import Progress, no_progress
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.registry import load_method
from visprune.quantize.quantize_options import QuantizeOptions
from visprune.quantize.quantizer import prepare
from visprune.records import sha256
from visprune.runtime.prompts import check_prompt, check_system
from visprune.runtime.samples import read_samples
from visprune.staging import tidy
from visprune.targets import target
from visprune.verified import verify

__all__ = ["FLOATS", "SweepPlan", "sweep"]

FLOATS = ("fp32", "fp16")
_MARKER = "sweep.json"
_ALWAYS = ("none", "random")


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep combines.

    Attributes:
        methods: Of pruning. `none` is the row with nothing pruned, and is there anyhow, as `random` is.
        ratios: Fractions kept, in (0, 1]; of the visual work for fitprune. 1 is the same for all methods.
        precisions: fp32, fp16, int8, int8-dynamic, fp8, int4.
        calibration: Samples to fit recipes and to quantize with; a bundled set for the demo model.

    Raises:
        UsageError: Nothing to combine, or something there is not.
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
        """The ratios below 1, most tokens first."""
        return tuple(sorted((ratio for ratio in self.ratios if ratio < 1.0), reverse=True))


def sweep(
    model: str | None,
    plan: SweepPlan,
    work: Workload,
    output: Path,
    *,
    against: str | None = None,
    progress: Progress | None = None,
    questions: int = QUESTIONS,
) -> Comparison:
    """Make what is missing, count right answers (of the demo model), and measure all rows in one run.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        plan: What to combine.
        work: What each row does in each round.
        output: The directory of the sweep; an earlier one of the same model goes on.
        against: "transformers" for the checkpoint in PyTorch beside them.
        progress: Called as it goes on.
        questions: Asked of each row of the demo model; 0 for none.

    Raises:
        UsageError: The directory is something else, or a sweep of another model.
        VispruneError: The model or the work cannot be used. What cannot be made of a plan does not stop a
            sweep, but is named in its report.
    """
    report = progress or no_progress
    checkpoint = find(model)
    _check_calibration(plan, checkpoint)
    check_work(work, against)
    _check_system(work.system, checkpoint)
    _claim(output, checkpoint, plan.calibration)
    maker = _Maker(model, checkpoint, plan, output / "bundles", report)
    rows = LineUp()
    for precision in plan.precisions:
        _add(rows, maker, precision)
    if not rows.entries:
        raise UnsupportedError(rows.not_made[0].reason, "Nothing could be made; correct that first.")
    check_prompt(work.prompt, rows.entries[0].manifest)
    found = {}
    if checkpoint.name == DEMO and questions:
        (output / "accuracy").mkdir(exist_ok=True)
        found = demo_accuracy(rows.entries, output / "accuracy", report, questions, work.system)
    else:
        rows.notes.append("Accuracy was not measured: questions with known answers are needed.")
    if against is not None:
        rows.entries += in_pytorch(rows.entries, checkpoint.path)
    done = run(rows, work, report)
    measured = tuple(replace(row, accuracy=found.get(row.name)) for row in done.report.rows)
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
    """Refuse a system prompt that the checkpoint cannot show, before anything is made."""
    if system is None:
        return
    from visprune.export.checkpoint.loading import load_config
    from visprune.export.checkpoint.processors import load_processor

    processor = load_processor(checkpoint, load_config(checkpoint))
    check_system(system, processor.text, processor.template, checkpoint.name)


def _claim(output: Path, checkpoint: Checkpoint, calibration: Path | None) -> None:
    """Make the directory, or find it to be an earlier sweep of this model with this calibration."""
    marker = output / _MARKER
    facts = {
        "model": checkpoint.name,
        "weights_sha256": checkpoint.weights_sha256(),
        "calibration_sha256": sha256(calibration) if calibration is not None else None,
    }
    if marker.is_file():
        try:
            earlier = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
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
    write_file(marker, json.dumps(facts, indent=1) + "\n")
    tidy(output / "bundles")


def _add(rows: LineUp, maker: _Maker, precision: str) -> None:
    """The rows of one precision."""
    plan = maker.plan
    _try(rows, maker, _Wanted(f"none, {precision}", "none", precision, "unpruned"))
    pruned: list[Entry] = []
    for method in (name for name in plan.methods if name not in _ALWAYS):
        for ratio in plan.pruned:
            wanted = _Wanted(f"{method} {100 * ratio:g}%, {precision}", method, precision, "given", ratio)
            pruned += _try(rows, maker, wanted)
    if not plan.pruned:
        return
    drawn = _try(rows, maker, _Wanted(f"random, {precision}", "random", precision, "random", plan.pruned[0]))
    for one in drawn:
        rows.entries.remove(one)
        budget = one.manifest.pruning.budget
        asked = [budget.from_ratio(ratio) for ratio in plan.pruned] if "random" in plan.methods else []
        counts = {*asked, *(random_tokens(other.manifest, other.keep) for other in pruned)}
        for count in sorted(counts, reverse=True):
            name = f"random {100 * count / budget.visual_tokens:.3g}%, {precision}"
            contender = replace(one.contender, name=name, keep_tokens=count, ratio=None)
            rows.entries.append(replace(one, contender=contender))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A row that is to be."""

    name: str
    method: str
    precision: str
    role: Role
    ratio: float = 1.0


def _try(rows: LineUp, maker: _Maker, wanted: _Wanted) -> list[Entry]:
    """Add a row; where it cannot be made, that is noted."""
    try:
        bundle = maker.bundle(wanted.method, wanted.precision, wanted.ratio)
        keeps = {} if _fits(wanted.method) else {"ratio": wanted.ratio}
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


def _fits(method: str) -> bool:
    """Whether a bundle of a method is for one ratio."""
    return issubclass(load_method(method), FitPrune)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Exports, fits and quantizes into one directory, what is not there yet."""

    model: str | None
    checkpoint: Checkpoint
    plan: SweepPlan
    folder: Path
    progress: Progress
    failed: dict[Path, VispruneError] = field(default_factory=dict)

    def bundle(self, method: str, precision: str, ratio: float = 1.0) -> Bundle:
        """The bundle that serves a row.

        Raises:
            VispruneError: It cannot be made; why.
        """
        if _fits(method):
            name = f"{method}-{ratio:g}"
        else:  # for any ratio; a method inside the LLM must be exported with one that prunes
            inside = load_method(method).place != "before the LLM"
            name, ratio = method, self.plan.pruned[0] if inside else 1.0
        if precision in FLOATS:
            return self._once(name, precision, lambda place: self._export(place, method, precision, ratio))
        width = next((width for width in FLOATS if width in self.plan.precisions), FLOATS[0])
        source = self._once(name, width, lambda place: self._export(place, method, width, ratio))
        kind = precision if width == FLOATS[0] else f"{precision}-{width}"
        return self._once(name, kind, lambda place: self._quantize(source, place, precision))

    def _once(self, name: str, kind: str, make: Callable[[Path], Bundle]) -> Bundle:
        """A bundle that is there and whole, or a new one in its place."""
        place = self.folder / f"{name}-{kind}"
        if place.exists():
            try:
                found = Bundle.open(place)
                verify(found)
            except BundleError as error:
                raise UsageError(
                    f"{place} is not whole: {error.what}",
                    f"Remove it, and run the sweep again: rm -r {place}",
                ) from None
            if found.manifest.source.weights_sha256 == self.checkpoint.weights_sha256():
                return found
            raise UsageError(f"{place} is of another model.", "Choose another directory with -o.")
        if place in self.failed:
            raise self.failed[place]
        self.progress(f"making {place.name}", 0, 1)
        try:
            return make(place)
        except VispruneError as error:
            self.failed[place] = error
            raise

    def _export(self, place: Path, method: str, precision: str, ratio: float) -> Bundle:
        from visprune.export import export

        fits: dict[str, Any] = {"calibration": self.plan.calibration} if _fits(method) else {}
        return export(
            self.model,
            method=method,
            ratio=ratio,
            output=place,
            dtype=precision,
            verify=False,
            **fits,
        )

    def _quantize(self, source: Bundle, place: Path, precision: str) -> Bundle:
        from visprune.quantize import quantize

        return quantize(source, place, precision=precision, calibration=self.plan.calibration, timing=False)
