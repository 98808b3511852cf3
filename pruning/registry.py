"""Registry of the pruning methods by name.

A method is one file, and one line in `BUILTIN`. Another package adds its own methods through the entry-point
group `visprune.pruning_methods`, in the same form `module:Class`. Loading a method imports its module, which
imports torch only when it computes something.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from visprune.errors import UnsupportedError
from visprune.names import lookup

if TYPE_CHECKING:
    from visprune.pruning.base import LayerPruner, VisionPruner

__all__ = ["BUILTIN", "load_method", "method_name", "method_names"]

GROUP = "visprune.pruning_methods"

BUILTIN = {
    "cdpruner": "visprune.pruning.cdpruner:CDPruner",
    "dart": "visprune.pruning.dart:Dart",
    "divprune": "visprune.pruning.divprune:DivPrune",
    "downsample": "visprune.pruning.downsample:Downsample",
    "fastervlm": "visprune.pruning.fastervlm:FasterVLM",
    "fastv": "visprune.pruning.fastv:FastV",
    "fitprune": "visprune.pruning.fitprune:FitPrune",
    "fopru-rank": "visprune.pruning.fopru:FoPruRank",
    "fopru-row": "visprune.pruning.fopru:FoPruRow",
    "freepruner": "visprune.pruning.freepruner:FreePruner",
    "holov": "visprune.pruning.holov:HoloV",
    "none": "visprune.pruning.keep_all:KeepAll",
    "prumerge+": "visprune.pruning.prumerge:PruMergePlus",
    "pyramiddrop": "visprune.pruning.pyramiddrop:PyramidDrop",
    "random": "visprune.pruning.random_draw:Random",
    "resize": "visprune.pruning.resize:Resize",
    "sparsevlm": "visprune.pruning.sparsevlm:SparseVLM",
    "uniform": "visprune.pruning.uniform:Uniform",
    "visionzip": "visprune.pruning.visionzip:VisionZip",
    "vispruner": "visprune.pruning.vispruner:VisPruner",
}


def _table() -> dict[str, str]:
    """Map names to `module:Class`. A built-in name cannot be taken over by another package."""
    from importlib import metadata  # 15 ms, which `visprune --help` does without

    added = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return added | BUILTIN


def method_names() -> list[str]:
    """Return all known names, sorted."""
    return sorted(_table())


def load_method(name: str) -> type[VisionPruner] | type[LayerPruner]:
    """Return the class of a method.

    Raises:
        UsageError: No method has this name.
        UnsupportedError: Another package's method cannot be imported.
    """
    place = lookup(name, _table(), "pruning method")
    module, _, attribute = place.partition(":")
    try:
        method: type[VisionPruner] | type[LayerPruner] = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if name in BUILTIN:
            raise
        raise UnsupportedError(
            f"The pruning method {name!r} of another package ({place}) cannot be loaded: {error}.",
            "Update that package, or remove it.",
        ) from error
    return method


def method_name(method: type) -> str:
    """Return the registered name of a method's class; the class's own name if it is not registered."""
    place = f"{method.__module__}:{method.__qualname__}"
    return next((name for name, value in _table().items() if value == place), method.__qualname__.lower())
