"""Comparison of the outputs of graphs with those of PyTorch, with one graph in memory at a time.

Differences are relative to the largest value of the reference, because features of different towers differ
widely in magnitude.
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

__all__ = [
    "KEPT_TOLERANCE",
    "Arrays",
    "Check",
    "GraphRunner",
    "free_memory",
    "relative_difference",
    "trim_heap",
]

# Largest difference allowed, relative to the largest reference value. Rounding through some dozens of layers
# makes about 1e-5 in float32 and 1e-2 in float16.
TOLERANCE = {"float32": 5e-4, "float16": 4e-2}
# Share of kept tokens that may differ, because scores near the cut are equal up to rounding.
KEPT_TOLERANCE = {"float32": 0.02, "float16": 0.1}
# The same for methods that pick tokens one by one: a pick that rounding changes also changes later picks.
CHAINED_TOLERANCE = {"float32": 0.1, "float16": 0.5}

Arrays = dict[str, NDArray[Any]]


class Check:
    """The rows of a comparison, which ends at the first failure, because later ones would follow from it.

    Args:
        dtype: Dtype of the bundle, which decides the tolerance.
        report: Called with the name of each comparison.

    Attributes:
        tolerance: Largest relative difference allowed.
        rows: The comparisons made so far.
    """

    def __init__(self, dtype: str, report: Callable[[str], None]) -> None:
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.report = report
        self.rows: list[ParityRow] = []

    def close(self, name: str, got: NDArray[Any], want: Tensor, note: str = "") -> None:
        """Compare two tensors by their largest relative difference.

        Raises:
            ParityError: The difference is larger than the tolerance, or the shapes differ.
        """
        if got.shape != tuple(want.shape):
            note = f"shape {got.shape} instead of {tuple(want.shape)}"
        self.add(name, relative_difference(got, want), self.tolerance, note)

    def tokens(self, name: str, got: NDArray[Any], want: Tensor, tolerance: float) -> None:
        """Compare tokens made of several by the share of tokens that differ: [M, D].

        Args:
            name: Name of the comparison.
            got: The graph's tokens.
            want: Those of the reference. A patch as near to one token as to another may be in either.
            tolerance: Largest share allowed.

        Raises:
            ParityError: A larger share differs, or the shapes differ.
        """
        if got.shape != tuple(want.shape):
            self.close(name, got, want)
        apart = [
            relative_difference(one, other) > self.tolerance for one, other in zip(got, want, strict=True)
        ]
        differ = sum(apart)
        self.add(name, differ / len(apart), tolerance, f"{differ} of {len(apart)} differ")

    def kept(
        self,
        name: str,
        got: Sequence[NDArray[Any]],
        want: Sequence[NDArray[Any]],
        tolerance: float,
        *,
        ordered: bool = True,
    ) -> None:
        """Compare two choices of tokens by the share of tokens that differ.

        Args:
            name: Name of the comparison.
            got: The graph's choice, indices for each image.
            want: The reference's choice, in any order.
            tolerance: Largest share allowed.
            ordered: Whether the graph's indices must be ascending.

        Raises:
            ParityError: A larger share differs, or the indices are not ascending.
        """
        sets = [(set(a.tolist()), set(b.tolist())) for a, b in zip(got, want, strict=True)]
        differ = sum(len(a - b) for a, b in sets)
        count = sum(len(b) for _, b in sets)
        ascending = not ordered or all(bool((np.diff(row) > 0).all()) for row in got)
        note = f"{differ} of {count} differ" if ascending else "indices are not ascending"
        self.add(name, differ / count if ascending else float("inf"), tolerance, note)

    def add(self, name: str, difference: float, tolerance: float, note: str) -> None:
        """Add one row.

        Args:
            name: Name of the comparison.
            difference: The difference found.
            tolerance: The largest difference allowed.
            note: Details for the reader.

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


def relative_difference(got: NDArray[Any], want: Tensor) -> float:
    """Return the largest difference, relative to the largest value of the reference.

    It is infinite if the shapes differ, or if `got` holds NaN or infinity.
    """
    reference = want.detach().float().numpy()
    if got.shape != reference.shape or not np.isfinite(got).all():
        return float("inf")
    scale = float(np.abs(reference).max(initial=0.0)) or 1.0
    return float(np.abs(got.astype(np.float32) - reference).max(initial=0.0)) / scale


class GraphRunner:
    """A runner of the bundle's graphs on the CPU, which holds a graph in memory only while it is used.

    Args:
        bundle: A bundle that is complete except for its parity result.
        low_memory: See `BackendOptions`.
    """

    def __init__(self, bundle: Bundle, *, low_memory: bool = False) -> None:
        self.bundle = bundle
        self.open = backend("cpu")
        self.options = BackendOptions("cpu", usable_cores(), low_memory)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Callable[[Arrays], Arrays]]:
        """Open one graph; yield a function that runs it and ignores arrays that it does not take."""
        specs = {spec.name: spec.dtype for spec in self.bundle.manifest.graphs[name].inputs}
        with self.open(self.bundle, name, self.options) as runner:

            def run(feed: Arrays) -> Arrays:
                typed = {key: np.ascontiguousarray(feed[key], dtype=specs[key]) for key in specs}
                # Copied, because an output may keep alive all memory of the backend, including the weights.
                return {key: np.array(to_numpy(value)) for key, value in runner.infer(typed).items()}

            yield run
        trim_heap()

    def run(self, name: str, feeds: Sequence[Arrays]) -> list[Arrays]:
        """Run one graph on each of several feeds."""
        with self.opened(name) as run:
            return [run(feed) for feed in feeds]


def free_memory() -> None:
    """Collect garbage and return freed memory to the system, before the next large model or graph is loaded.

    Modules refer to each other in cycles, so their weights stay in memory until they are collected.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Have glibc return freed memory to the system; otherwise it keeps about a gigabyte of the last graph."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
