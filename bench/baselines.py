"""The baselines of a pruned row: random tokens, and a smaller picture, each with no more tokens than the row.

Budgets are equal if the decoder has equally much work: for a method before the LLM, that is the same number
of tokens; for a method inside it, the number of tokens whose work is nearest. A baseline that cannot keep
that very number keeps the next smaller one that it can: `resize` keeps the square of a whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from visprune.bench.entries import (
    Entry,
    LineUp,
    bundle_of,
    entry,
    group_of,
    method_of,
    precision_of,
    unique_name,
)
from visprune.bench.report.report import BASELINES, NotMade, Role
from visprune.budget import Budget
from visprune.bundle import Bundle
from visprune.errors import VispruneError
from visprune.estimate.flops import savings
from visprune.manifest import Manifest
from visprune.rebuild import export_command
from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["MADE_HERE", "Maker", "Missing", "add_baselines", "baseline_pairs", "random_tokens"]

Maker = Callable[[Bundle, str], Bundle]
"""Makes a bundle of the same model and precision with another method; raises VispruneError if it cannot."""

MADE_HERE = "exported for this comparison, without a comparison with PyTorch, and not kept."


@dataclass(frozen=True, slots=True)
class Missing:
    """Rows whose bundle could not be made.

    Attributes:
        rows: Their names.
        reason: Why it could not be made.
        command: The commands that make it.
    """

    rows: str
    reason: str
    command: str

    @classmethod
    def of(cls, rows: str, method: str, manifest: Manifest, error: VispruneError) -> Missing:
        """Return the rows that are missing because a method's bundle of a model could not be made."""
        return cls(rows, error.what, export_command(manifest, method=method))

    def not_made(self) -> NotMade:
        """Return the record of a report."""
        return NotMade(self.rows, f"{self.reason} To get this row: {self.command}")


def random_tokens(manifest: Manifest, keep: Keep) -> int:
    """Return how many random tokens of a tile give the decoder as much work as a row has."""
    if manifest.layer_pruning is None or manifest.shapes is None:
        return keep.tokens
    found = savings(manifest, keep_tokens=keep.tokens, layer_ratio=keep.layer_ratio)
    count = manifest.pruning.budget.visual_tokens
    budget = replace(manifest.pruning.budget, unit="token", unit_tokens=1, prunable=True, minimum=1)
    drawn = replace(manifest, layer_pruning=None, pruning=replace(manifest.pruning, budget=budget))

    def difference(tokens: int) -> int:
        work = savings(drawn, keep_tokens=tokens)
        return abs(work.visual.pruned - found.visual.pruned) if work and found else 0

    return min(range(1, count + 1), key=difference)


def add_baselines(found: LineUp, entries: Sequence[Entry], make: Maker) -> list[Missing]:
    """Add the rows of each baseline for the pruned rows of one model in one precision.

    Rows of a baseline that a user gave are not added again. A baseline's bundle that a user gave serves the
    other numbers of tokens too.

    Args:
        found: The rows; new ones are added at the end.
        entries: The rows of one model in one precision, as `group_of` groups them.
        make: Makes the bundle of a baseline that is not among them.

    Returns:
        The rows that could not be made.
    """
    pruned = [one for one in entries if _is_pruned(one)]
    counts = dict.fromkeys(random_tokens(one.manifest, one.keep) for one in pruned)
    missing = [_add_baseline(found, entries, list(counts), method, make) for method in BASELINES if counts]
    return [one for one in missing if one is not None]


def _add_baseline(
    found: LineUp, entries: Sequence[Entry], counts: Sequence[int], method: Role, make: Maker
) -> Missing | None:
    """Add the rows of one baseline; return those that could not be made."""
    manifest, given = entries[0].manifest, [one for one in entries if method_of(one.manifest) == method]
    total = manifest.pruning.budget.visual_tokens
    try:
        bundle = bundle_of(given[0]) if given else None
        if bundle is None:
            bundle = make(bundle_of(entries[0]), method)
    except VispruneError as error:
        at_most = "" if method == "random" else "at most "
        rows = ", ".join(f"{method}, {at_most}{count} of {total}" for count in counts)
        return Missing.of(rows, method, manifest, error)
    wanted = dict.fromkeys(bundle.manifest.pruning.budget.at_most(count) for count in counts)
    there = [one.keep.tokens for one in given]
    added = []
    for count in wanted:
        if count not in there:
            name = unique_name(found, f"{method} {count} of {total}, {precision_of(manifest)}")
            found.entries.append(entry(name, bundle, method, keep_tokens=count))
            added.append(name)
    if added and not given:
        found.notes.append(f"{', '.join(added)}: {MADE_HERE}")
    return None


def baseline_pairs(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Return the positions of each pruned row and of the rows of the baselines at its number of tokens."""
    at: dict[tuple[tuple[str, str, str], str, int], int] = {}
    budgets: dict[tuple[tuple[str, str, str], str], Budget] = {}
    for place, one in enumerate(entries):
        key = group_of(one.manifest), method_of(one.manifest)
        at.setdefault((*key, one.keep.tokens), place)
        budgets[key] = one.manifest.pruning.budget
    pairs = []
    for place, one in enumerate(entries):
        if not _is_pruned(one):
            continue
        count = random_tokens(one.manifest, one.keep)
        for method in BASELINES:
            key = group_of(one.manifest), method
            other = at.get((*key, budgets[key].at_most(count))) if key in budgets else None
            if other is not None:
                pairs.append((place, other))
    return pairs


def _is_pruned(one: Entry) -> bool:
    """Return whether a row is a pruned one that a user gave, and none of a baseline."""
    return one.contender.role == "given" and method_of(one.manifest) not in BASELINES
