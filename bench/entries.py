"""The rows of a comparison before they are measured: what runs, what it keeps, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from visprune.bench.measure.protocol import Contender
from visprune.bench.report.report import NotMade, Role
from visprune.bundle import Bundle
from visprune.manifest import Manifest
from visprune.runtime.vision.kept_tokens import Keep, keep_for
from visprune.targets import WIDTHS

__all__ = [
    "Entry",
    "LineUp",
    "bundle_of",
    "entry",
    "group_of",
    "is_unpruned",
    "method_of",
    "precision_of",
    "unique_name",
]


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
    """Return the precision of the linear layers: fp32 or fp16; if quantized, all of them, joined by +.

    A head in int8-weights is not named: it is what `visprune quantize` gives to a decoder by default.
    """
    float_name = WIDTHS.get(manifest.dtype, manifest.dtype)
    if manifest.quantization is None:
        return float_name
    parts = {part: name for part, name in manifest.quantization.parts.items() if part != "embedding"}
    if parts.get("head") == "int8-weights":
        del parts["head"]
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


def group_of(manifest: Manifest) -> tuple[str, str, str]:
    """Return a key that is equal for rows that differ in pruning alone."""
    return manifest.source.weights_sha256, manifest.target, precision_of(manifest)


def bundle_of(one: Entry) -> Bundle:
    """Return the bundle that a row runs."""
    return Bundle(Path(one.contender.path), one.manifest)


def unique_name(found: LineUp, name: str) -> str:
    """Return the name, with a number behind it if a row has that name already."""
    taken = {one.contender.name for one in found.entries}
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, 99))) if n not in taken)
