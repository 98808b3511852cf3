"""The bundles of a sweep: exported, fitted and quantized into one directory, if they are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError, VispruneError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.progress import Progress
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.registry import load_method
from visprune.verified import verify

__all__ = ["FLOATS", "SweepBundles", "is_fitted"]

FLOATS = ("fp32", "fp16")
"""Precisions that an export writes; the others are quantized from one of these."""


def is_fitted(method: str) -> bool:
    """Return whether a method is fitted for one ratio, so that each ratio needs a bundle of its own."""
    return issubclass(load_method(method), FitPrune)


@dataclass(frozen=True, slots=True)
class SweepBundles:
    """The bundles of a sweep, made when they are first asked for.

    Attributes:
        model: The model as `export` takes it.
        checkpoint: Its checkpoint.
        folder: Directory of the bundles.
        precisions: All precisions of the sweep.
        pruned: All ratios below 1, the largest first.
        calibration: Samples to fit recipes and to quantize with; a bundled set for the demo model.
        progress: Called when a bundle is about to be made.
        failed: Bundles that could not be made, with the reason, so that none is tried twice.
    """

    model: str | None
    checkpoint: Checkpoint
    folder: Path
    precisions: Sequence[str]
    pruned: Sequence[float]
    calibration: Path | None
    progress: Progress
    failed: dict[Path, VispruneError] = field(default_factory=dict)

    def bundle(self, method: str, precision: str, ratio: float = 1.0) -> Bundle:
        """Return the bundle that serves a row; make it if it is not there.

        Raises:
            VispruneError: It cannot be made.
        """
        if is_fitted(method):
            name = f"{method}-{ratio:g}"
        else:  # serves any ratio, but a method inside the LLM must be exported with one that prunes
            inside = load_method(method).place == "inside the LLM"
            name, ratio = method, self.pruned[0] if inside else 1.0
        if precision in FLOATS:
            return self._once(name, precision, lambda place: self._export(place, method, precision, ratio))
        width = next((width for width in FLOATS if width in self.precisions), FLOATS[0])
        source = self._once(name, width, lambda place: self._export(place, method, width, ratio))
        kind = precision if width == FLOATS[0] else f"{precision}-{width}"
        return self._once(name, kind, lambda place: self._quantize(source, place, precision))

    def _once(self, name: str, kind: str, make: Callable[[Path], Bundle]) -> Bundle:
        """Return the bundle at its place if it is whole; otherwise make it there."""
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

        fits: dict[str, Any] = {"calibration": self.calibration} if is_fitted(method) else {}
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

        return quantize(source, place, precision=precision, calibration=self.calibration, timing=False)
