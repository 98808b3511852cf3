"""The rows of a comparison: the bundles that were given, and rows to compare them with.

Every model in every precision gets a row with nothing pruned and, for each budget of a pruned row, a row of
as many random tokens. Budgets are equal if the decoder has equally much work: for a method before the LLM,
that is the same number of tokens; for a method inside it, the number of tokens whose work is nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from visprune.bench.measure.protocol import Contender
from visprune.bench.report.report import NotMade, Role
from visprune.bundle import Bundle
from visprune.errors import UsageError, VispruneError
from visprune.estimate.flops import savings
from visprune.manifest import Manifest
from visprune.rebuild import export_command
from visprune.runtime.vision.kept_tokens import Keep, keep_for
from visprune.targets import WIDTHS

__all__ = ["Entry", "LineUp", "entry", "is_unpruned", "line_up", "method_of", "precision_of", "random_tokens"]

Maker = Callable[[Bundle, str], Bundle]
"""Makes a bundle of the same model and precision with another method; raises VispruneError if it cannot."""

_MADE_HERE = "exported for this comparison, without a comparison with PyTorch, and not kept."


@dataclass(frozen=True, slots=True)
class Entry:
    """A row to measure: the contender that runs, and the manifest of its bundle."""

    contender: Contender
    manifest: Manifest

    @property
    def keep(self) -> Keep:
        """The numbers of tokens that the row keeps."""
        return keep_for(self.manifest, ratio=self.contender.ratio, keep_tokens=self.contender.keep_tokens)


@dataclass(slots=True)
class LineUp:
    """The rows in order, the rows that could not be made, and notes for the report."""

    entries: list[Entry] = field(default_factory=list)
    not_made: list[NotMade] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def method_of(manifest: Manifest) -> str:
    """Return the names of the methods, such as fopru-rank, fitprune, or fopru-rank + fastv."""
    inside = manifest.layer_pruning
    names = [manifest.pruning.method] if inside is None or manifest.pruning.budget.prunable else []
    return " + ".join([*names, *([inside.method] if inside else [])])


def precision_of(manifest: Manifest) -> str:
    """Return the precision of the linear layers: fp32 or fp16; if quantized, all of them, joined by +."""
    float_name = WIDTHS.get(manifest.dtype, manifest.dtype)
    if manifest.quantization is None:
        return float_name
    parts = {part: name for part, name in manifest.quantization.parts.items() if part != "embedding"}
    return "+".join(dict.fromkeys(float_name if name == "float" else name for name in parts.values()))


def is_unpruned(manifest: Manifest, keep: Keep) -> bool:
    """Return whether every layer sees every visual token."""
    if keep.tokens != manifest.pruning.budget.visual_tokens:
        return False
    counts = keep.in_layers(manifest, keep.tokens)
    return all(count == keep.tokens for count in counts)


def entry(name: str, bundle: Bundle, role: Role = "given", **keeps: int | float | None) -> Entry:
    """Make a row of a bundle; `keeps` is keep_tokens or ratio.

    Raises:
        UsageError: The bundle cannot keep that many tokens.
    """
    contender = Contender(name, role, str(bundle.path.resolve()), **keeps)  # type: ignore[arg-type]
    found = Entry(contender, bundle.manifest)
    _ = found.keep  # so that an impossible number is refused here, and not in the worker
    return found


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


def line_up(bundles: Sequence[Bundle], make: Maker) -> LineUp:
    """Return the rows for bundles that a user gave, with the rows to compare them with.

    Args:
        bundles: In the order of the command line; one may come twice.
        make: Makes a bundle that is not among them.
    """
    found = LineUp([_given(name, bundle) for name, bundle in zip(_names(bundles), bundles, strict=True)])
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for one in found.entries:
        groups.setdefault(_group(one.manifest), []).append(one)
    for entries in groups.values():
        _add_unpruned(found, entries, make)
        _add_random(found, entries, make)
    models = list(dict.fromkeys(one.manifest.source.model for one in found.entries))
    if len({one.manifest.source.weights_sha256 for one in found.entries}) > 1:
        found.notes.append(
            f"The rows are of different models ({', '.join(models)}): each is compared with the unpruned row "
            "of its own model."
        )
    return found


def _given(name: str, bundle: Bundle) -> Entry:
    found = entry(name, bundle)
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


def _group(manifest: Manifest) -> tuple[str, str, str]:
    """Return a key that is equal for rows that differ in pruning alone."""
    return manifest.source.weights_sha256, manifest.target, precision_of(manifest)


def _add_unpruned(found: LineUp, entries: list[Entry], make: Maker) -> None:
    if any(one.contender.role == "unpruned" for one in entries):
        return
    for one in entries:
        full = _at_full(one)
        if full is not None:
            found.entries.insert(found.entries.index(entries[0]), full)
            return
    name = _unique(found, f"none, {precision_of(entries[0].manifest)}")
    try:
        made = make(_bundle(entries[0]), "none")
    except VispruneError as error:
        found.not_made.append(NotMade(name, _why_missing("none", entries[0].manifest, error)))
        return
    found.entries.insert(found.entries.index(entries[0]), entry(name, made, "unpruned"))
    found.notes.append(f"{name}: {_MADE_HERE}")


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


def _add_random(found: LineUp, entries: list[Entry], make: Maker) -> None:
    pruned = [one for one in entries if one.contender.role == "given" and method_of(one.manifest) != "random"]
    drawn = [one for one in entries if method_of(one.manifest) == "random"]
    counts = dict.fromkeys(random_tokens(one.manifest, one.keep) for one in pruned)
    wanted = [count for count in counts if count not in [one.keep.tokens for one in drawn]]
    if not wanted:
        return
    manifest = entries[0].manifest
    total = manifest.pruning.budget.visual_tokens
    try:
        bundle = _bundle(drawn[0]) if drawn else make(_bundle(entries[0]), "random")
    except VispruneError as error:
        names = ", ".join(f"random, {count} of {total}" for count in wanted)
        found.not_made.append(NotMade(names, _why_missing("random", manifest, error)))
        return
    added = [f"random {count} of {total}, {precision_of(manifest)}" for count in wanted]
    added = [_unique(found, name) for name in added]
    for name, count in zip(added, wanted, strict=True):
        found.entries.append(entry(name, bundle, "random", keep_tokens=count))
    if not drawn:
        found.notes.append(f"{', '.join(added)}: {_MADE_HERE}")


def _bundle(one: Entry) -> Bundle:
    return Bundle(Path(one.contender.path), one.manifest)


def _unique(found: LineUp, name: str) -> str:
    taken = {one.contender.name for one in found.entries}
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, 99))) if n not in taken)


def _why_missing(method: str, manifest: Manifest, error: VispruneError) -> str:
    """Return why a row is missing, and the commands that would make its bundle."""
    return f"{error.what} To get this row: {export_command(manifest, method=method)}"
