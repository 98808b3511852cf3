"""Compare what graphs give with what PyTorch gives, one graph in memory at a time.

Differences are relative to the largest value of the reference, because features of different towers have
very different sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visprune.bundle import Bundle
from visprune.cores import usable_cores
from visprune.errors import ParityError
from visprune.manifest import ParityRow
from visprune.runtime.backends import backend
from visprune.runtime.backends.runner import BackendOptions, to_numpy

__all__ = ["KEPT_TOLERANCE", "Arrays", "Check", "Graphs", "difference", "release", "trim"]

# Largest difference, relative to the largest reference value; float32 rounding through some dozens of
# layers stays near 1e-5, float16 near 1e-2.
TOLERANCE = {"float32": 5e-4, "float16": 4e-2}
# Share of kept tokens that may differ, where scores near the cut are equal up to rounding.
KEPT_TOLERANCE = {"float32": 0.02, "float16": 0.1}
# The same for a method that picks step by step, where one pick that rounding changes also changes later ones.
CHAINED_TOLERANCE = {"float32": 0.1, "float16": 0.5}

Arrays = dict[str, NDArray[Any]]


class Check:
    """Collects rows; stops at the first that failed, because later ones follow from it."""

    def __init__(self, dtype: str, report: Callable[[str], None]) -> None:
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.report = report
        self.rows: list[ParityRow] = []

    def close(self, name: str, got: NDArray[Any], want: Tensor, note: str = "") -> None:
        """Two tensors, by their largest difference."""
        if got.shape != tuple(want.shape):
            note = f"shape {got.shape} instead of {tuple(want.shape)}"
        self.add(name, difference(got, want), self.tolerance, note)

    def kept(
        self, name: str, got: Sequence[NDArray[Any]], want: Sequence[NDArray[Any]], tolerance: float
    ) -> None:
        """Two choices of tokens, a set for each image; the first must be ascending."""
        sets = [(set(a.tolist()), set(b.tolist())) for a, b in zip(got, want, strict=True)]
        differ = sum(len(a - b) for a, b in sets)
        count = sum(len(b) for _, b in sets)
        ascending = all(bool((np.diff(row) > 0).all()) for row in got)
        note = f"{differ} of {count} differ" if ascending else "indices are not ascending"
        self.add(name, differ / count if ascending else float("inf"), tolerance, note)

    def add(self, name: str, difference: float, tolerance: float, note: str) -> None:
        """One row.

        Raises:
            ParityError: The difference is larger than the tolerance.
        """
        passed = difference <= tolerance
        self.rows.append(ParityRow(name, difference, tolerance, passed, note))
        self.report(name)
        if not passed:
            raise ParityError(
                f"The exported {name} differs from PyTorch by {difference:.3g}; {tolerance:.3g} is allowed"
                f"{': ' + note if note else ''}.",
                "Nothing was written; try --dtype fp32, or export with --no-verify to look into it.",
            )


def difference(got: NDArray[Any], want: Tensor) -> float:
    """The largest difference, relative to the largest value wanted; infinite where it means nothing."""
    reference = want.detach().float().numpy()
    if got.shape != reference.shape or not np.isfinite(got).all():
        return float("inf")
    scale = float(np.abs(reference).max(initial=0.0)) or 1.0
    return float(np.abs(got.astype(np.float32) - reference).max(initial=0.0)) / scale


class Graphs:
    """Runs graphs of the bundle on the CPU, each in memory only while it is used.

    Args:
        bundle: Complete but for its parity result.
        low_memory: See `BackendOptions`.
    """

    def __init__(self, bundle: Bundle, *, low_memory: bool = False) -> None:
        self.bundle = bundle
        self.open = backend("cpu")
        self.options = BackendOptions("cpu", usable_cores(), low_memory)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Callable[[Arrays], Arrays]]:
        """A function that runs one graph; what the graph does not take is left out."""
        specs = {spec.name: spec.dtype for spec in self.bundle.manifest.graphs[name].inputs}
        with self.open(self.bundle, name, self.options) as runner:

            def run(feed: Arrays) -> Arrays:
                typed = {key: np.ascontiguousarray(feed[key], dtype=specs[key]) for key in specs}
                # Copied: what a backend gives may keep all of its memory, weights included.
                return {key: np.array(to_numpy(value)) for key, value in runner.infer(typed).items()}

            yield run
        trim()

    def run(self, name: str, feeds: Sequence[Arrays]) -> list[Arrays]:
        """Run one graph on each feed."""
        with self.opened(name) as run:
            return [run(feed) for feed in feeds]


def release() -> None:
    """Give memory back before the next large thing is loaded.

    Modules refer to each other in circles, so they hold their weights until they are collected.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Let glibc give back what was freed; it keeps a gigabyte of the last graph unless it is told."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
