"""The rows of the baselines in `visprune eval`, beside the bundles that a user gave."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from visprune.bench.baselines import Maker, Missing, add_baselines, baseline_pairs
from visprune.bench.entries import LineUp, precision_of
from visprune.bench.lineup import given_entry, grouped
from visprune.bench.make_bundle import export_variant
from visprune.bundle import Bundle
from visprune.errors import UnsupportedError
from visprune.evaluation.answering import Candidate
from visprune.evaluation.evaluator import AddedRows, Baselines
from visprune.progress import Progress
from visprune.runtime.backends import ENGINES

__all__ = ["baseline_rows", "made_baselines"]


@contextmanager
def made_baselines(provider: str, progress: Progress, *, ray: bool) -> Iterator[Baselines]:
    """Yield the function that adds the baselines. Bundles that it makes are removed with the context.

    Args:
        provider: The execution provider; one of engines has engines built too.
        progress: Called as steps of an export go on.
        ray: Whether the workers are those of a Ray cluster. Then nothing is made, because another machine
            could not read it.
    """
    with tempfile.TemporaryDirectory(prefix="visprune-eval-") as folder:

        def make(bundle: Bundle, method: str) -> Bundle:
            if ray:
                raise UnsupportedError(
                    "A bundle that is made on this machine cannot be read by the others of a Ray cluster.",
                    "Make it at the same path on each machine, or on a shared disk.",
                )
            progress(f"making {method}, {precision_of(bundle.manifest)}", 0, 1)
            return export_variant(bundle, method, Path(folder), progress, engines=provider in ENGINES)

        yield lambda candidates, opened: baseline_rows(candidates, opened, make)


def baseline_rows(candidates: Sequence[Candidate], opened: Sequence[Bundle], make: Maker) -> AddedRows:
    """Return the rows of the baselines for bundles that a user gave.

    Args:
        candidates: The given bundles, each with what it keeps.
        opened: The same bundles, opened.
        make: Makes a baseline's bundle that is not among them.
    """
    rows = LineUp(
        [
            given_entry(one.name, bundle, ratio=one.ratio, keep_tokens=one.keep_tokens)
            for one, bundle in zip(candidates, opened, strict=True)
        ]
    )
    missing: list[Missing] = []
    for entries in grouped(rows.entries):
        missing += add_baselines(rows, entries, make)
    added = [one.contender for one in rows.entries[len(candidates) :]]
    return AddedRows(
        tuple(Candidate(Path(one.path), keep_tokens=one.keep_tokens, label=one.name) for one in added),
        tuple(baseline_pairs(rows.entries)),
        (*rows.notes, *_not_asked(missing)),
    )


def _not_asked(missing: Sequence[Missing]) -> list[str]:
    """Return a sentence for each reason why rows are missing, with the commands that make their bundles."""
    by_reason: dict[str, list[Missing]] = {}
    for one in missing:
        by_reason.setdefault(one.reason, []).append(one)
    return [
        f"not in the table: {'; '.join(one.rows for one in found)}. {reason} To get these rows, make their "
        f"bundles and give them too: {'; '.join(one.command for one in found)}"
        for reason, found in by_reason.items()
    ]
