"""The rows of a comparison: the bundles that were given, and rows to compare them with.

Every model in every precision gets a row with nothing pruned and, for each budget of a pruned row, the rows
of `baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from visprune.bench.baselines import MADE_HERE, Maker, Missing, add_baselines
from visprune.bench.entries import (
    Entry,
    LineUp,
    bundle_of,
    entry,
    group_of,
    is_unpruned,
    precision_of,
    unique_name,
)
from visprune.bundle import Bundle
from visprune.errors import UsageError, VispruneError

__all__ = ["given_entry", "grouped", "line_up"]


def line_up(bundles: Sequence[Bundle], make: Maker) -> LineUp:
    """Return the rows for bundles that a user gave, with the rows to compare them with.

    Args:
        bundles: In the order of the command line; one may come twice.
        make: Makes a bundle that is not among them.
    """
    names = _names(bundles)
    found = LineUp([given_entry(name, bundle) for name, bundle in zip(names, bundles, strict=True)])
    for entries in grouped(found.entries):
        _add_unpruned(found, entries, make)
        found.not_made += [missing.not_made() for missing in add_baselines(found, entries, make)]
    models = list(dict.fromkeys(one.manifest.source.model for one in found.entries))
    if len({one.manifest.source.weights_sha256 for one in found.entries}) > 1:
        found.notes.append(
            f"The rows are of different models ({', '.join(models)}): each is compared with the unpruned row "
            "of its own model."
        )
    return found


def grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the rows of each model in each precision."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for one in entries:
        groups.setdefault(group_of(one.manifest), []).append(one)
    return list(groups.values())


def given_entry(
    name: str, bundle: Bundle, ratio: float | None = None, keep_tokens: int | None = None
) -> Entry:
    """Make a row of a bundle that a user gave; its role is "unpruned" if it keeps every token.

    Raises:
        UsageError: The bundle cannot keep that many tokens.
    """
    found = entry(name, bundle, ratio=ratio, keep_tokens=keep_tokens)
    if not is_unpruned(bundle.manifest, found.keep):
        return found
    return replace(found, contender=replace(found.contender, role="unpruned"))


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Return the names of the directories; paths if two names are alike; numbered if one comes twice."""
    paths = [bundle.path.resolve() for bundle in bundles]
    alike = {path.name for path in paths if {p for p in paths if p.name == path.name} != {path}}
    names = [str(b.path) if p.name in alike else p.name for b, p in zip(bundles, paths, strict=True)]
    return [
        name if names[:index].count(name) == 0 else f"{name} ({names[:index].count(name) + 1})"
        for index, name in enumerate(names)
    ]


def _add_unpruned(found: LineUp, entries: list[Entry], make: Maker) -> None:
    if any(one.contender.role == "unpruned" for one in entries):
        return
    for one in entries:
        full = _at_full(one)
        if full is not None:
            found.entries.insert(found.entries.index(entries[0]), full)
            return
    name = unique_name(found, f"none, {precision_of(entries[0].manifest)}")
    try:
        made = make(bundle_of(entries[0]), "none")
    except VispruneError as error:
        found.not_made.append(Missing.of(name, "none", entries[0].manifest, error).not_made())
        return
    found.entries.insert(found.entries.index(entries[0]), entry(name, made, "unpruned"))
    found.notes.append(f"{name}: {MADE_HERE}")


def _at_full(one: Entry) -> Entry | None:
    """Return a row of the same bundle with nothing pruned, or None if the bundle cannot do that."""
    manifest = one.manifest
    if manifest.layer_pruning is not None and manifest.pruning.budget.prunable:
        return None  # it prunes at two places, and a ratio is about one of them
    contender = replace(
        one.contender, name=f"{one.contender.name} at 100%", role="unpruned", ratio=1.0, keep_tokens=None
    )
    try:
        full = Entry(contender, manifest)
        return full if is_unpruned(manifest, full.keep) else None
    except UsageError:  # a recipe fixes what is kept
        return None
