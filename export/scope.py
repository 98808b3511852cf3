"""How a method before the LLM counts on a model, and what it must offer where a picture is several tiles."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Literal

from visprune.budget import Budget, no_count
from visprune.errors import UnsupportedError, UsageError
from visprune.export.options import Methods
from visprune.export.parts import Features
from visprune.pruning.signals import SIGNALS

__all__ = ["budget_for"]


def budget_for(methods: Methods, features: Features, scope: Literal["tile", "global"]) -> Budget:
    """The budget of the method before the LLM.

    Args:
        methods: Asked for.
        features: Which tokens of the model are visual.
        scope: Of the choice where a picture is several tiles.

    Raises:
        UsageError: A global choice, or a count inside the LLM, which this model cannot have.
        UnsupportedError: The method cannot work on this model, or not in this scope.
    """
    pruner, name = methods.before, methods.before_asked.name
    budget = pruner.budget(features.layout)
    if features.tiling is None:
        if scope == "global":
            raise UsageError(
                "This model shows a picture as one tile, so there is no choice among several.",
                "Leave --anyres-scope out.",
            )
        return budget
    if "valid" not in inspect.signature(pruner.select).parameters:
        raise UnsupportedError(
            f"{name} cannot tell the padding of a tile from the picture: its `select` takes no `valid`.",
            "Add that argument to the method (see `visprune.pruning.base`), or use another method.",
        )
    if features.resamples and any(SIGNALS[s].matrix for s in pruner.signals):
        raise UnsupportedError(
            f"{name} scores pairs of patches, and this model mixes patches of large pictures.",
            "Use fopru-rank, which scores single patches, or divprune.",
        )
    if scope == "global" and not getattr(pruner, "across_tiles", False):
        raise UnsupportedError(
            f"{name} cannot choose among the tokens of all tiles at once.",
            "Leave --anyres-scope out, or use fopru-rank or fastervlm.",
        )
    asked = methods.inside_asked
    if asked is not None and asked.keep_tokens is not None:
        raise no_count(asked.name)
    return replace(budget, scope="image" if scope == "global" else "tile")
