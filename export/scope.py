"""The budgets of methods on a model, and what a method must offer where an image is several tiles.

This needs no PyTorch, so that a plan for a device can ask for the same budgets as an export.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

from visprune.budget import Budget, no_count
from visprune.errors import UnsupportedError, UsageError
from visprune.export.export_options import MethodRequest, Methods
from visprune.export.models.parts import Features
from visprune.manifest import LayerPruning, Pruning
from visprune.manifest_pruning import Resizing
from visprune.pruning.base import LayerPruner, Traits
from visprune.pruning.signals import SIGNALS
from visprune.runtime.vision.arrangement import arrange
from visprune.runtime.vision.kept_tokens import Keep, count_for

__all__ = ["budget_for", "check_room", "layer_pruning_for", "pruning_for"]

_QUESTION = 8  # tokens of a short question and the template's words around it


def pruning_for(methods: Methods, features: Features, scope: Literal["tile", "global"] = "tile") -> Pruning:
    """Return what the method before the LLM does on a model with the budget that was asked for.

    Args:
        methods: The methods and what was asked of each.
        features: Which tokens of the model are visual.
        scope: Where an image is several tiles: whether tokens are chosen within each, or among all.

    Raises:
        UsageError: As `budget_for`, or a count that the method cannot keep.
        UnsupportedError: As `budget_for`, or there is no attention to score with.
    """
    pruner, asked = methods.before, methods.before_asked
    if pruner.signals and max(features.layer_counts) == 0:
        raise UnsupportedError(
            "This model takes the patch embeddings as features: there is no attention layer to score with.",
            "Use a method without scores: uniform or random.",
        )
    traits = Traits.of(pruner)
    if traits.resizes and not features.resizable:
        raise UnsupportedError(
            f"{asked.name} makes images smaller, and this vision tower takes one size only.",
            "Use downsample, which makes the grid of its features smaller.",
        )
    budget = budget_for(methods, features, scope)
    if asked.keep_tokens is not None:
        keep = count_for(budget, asked.keep_tokens, features.tiling)
    else:
        keep = budget.from_ratio(1.0 if asked.ratio is None else asked.ratio)
    resizing = Resizing(features.image_size, features.patch_size) if traits.resizes else None
    return Pruning(
        method=asked.name,
        options=_knobs(pruner),
        keep_tokens=keep,
        budget=budget,
        grid=(features.side, features.side),
        grid_offset=features.skipped_patches,
        always_kept=features.always_kept,
        positions=pruner.positions,
        projects_all=traits.projected,
        needs_text=traits.needs_text,
        merges=traits.merges,
        resizing=resizing,
    )


def check_room(pruning: Pruning, features: Features, room: int, window: int | None) -> None:
    """Refuse a bundle whose decoder has no room for an image and a short question.

    Args:
        pruning: What the method before the LLM keeps.
        features: Which tokens are visual.
        room: The most tokens of a sequence.
        window: The decoder's sliding window in tokens, if it has one.

    Raises:
        UnsupportedError: The smallest image leaves no room for a question.
    """
    tiling = pruning.arranged(features.tiling, pruning.keep_tokens)
    smallest = arrange((tiling.tile_size, tiling.tile_size), tiling) if tiling else None
    tokens = Keep(pruning.keep_tokens).sequence_length(pruning, smallest)
    if tokens + _QUESTION > room:
        name = "sliding window" if room == window else "context"
        raise UnsupportedError(
            f"A picture takes {tokens} tokens of a prompt here, and the decoder's {name} holds {room}, which "
            "leaves no room for a question.",
            "Keep fewer visual tokens before the LLM, or take a model with a longer one.",
        )


def layer_pruning_for(
    pruner: LayerPruner, asked: MethodRequest, num_layers: int, tokens: int
) -> LayerPruning:
    """Return what a method inside the LLM does in a decoder with the budget that was asked for.

    Args:
        pruner: The method; fitprune with its scheme.
        asked: Its name, and the budget asked for.
        num_layers: Layers of the decoder.
        tokens: Visual tokens of one image that enter the LLM.

    Raises:
        UsageError: A count that cannot be kept.
        UnsupportedError: The method cannot work on so many layers.
    """
    layers = pruner.layers(num_layers)
    if list(layers) != sorted(set(layers) & set(range(num_layers - 1))):
        raise UnsupportedError(
            f"{asked.name} prunes at the layers {layers} of {num_layers}.",
            "Prune at ascending layers, each with another one after it.",
        )
    budget = pruner.budget(len(layers))
    if asked.keep_tokens is not None:
        whole = Budget(tokens)
        budget = replace(budget, ratio=whole.from_tokens(asked.keep_tokens) / tokens)
    elif asked.ratio is not None and not budget.is_recipe:
        budget = replace(budget, ratio=asked.ratio)
    return LayerPruning(
        method=asked.name,
        options=_knobs(pruner),
        layers=layers,
        boundary=pruner.boundary,
        positions=pruner.positions,
        budget=budget,
    )


def _knobs(pruner: Any) -> dict[str, Any]:
    """Return the settings of a method: the fields of its instance."""
    return {f.name: getattr(pruner, f.name) for f in fields(pruner)} if is_dataclass(pruner) else {}


def budget_for(methods: Methods, features: Features, scope: Literal["tile", "global"]) -> Budget:
    """Return the budget of the method before the LLM.

    Args:
        methods: The methods and what was asked of each.
        features: Which tokens of the model are visual.
        scope: As `pruning_for` takes it.

    Raises:
        UsageError: A global choice, or a count inside the LLM, which do not exist on this model.
        UnsupportedError: The method cannot work on this model, or not in this scope.
    """
    pruner, name = methods.before, methods.before_asked.name
    if not features.layout.has_cls and any(SIGNALS[s].needs_cls for s in pruner.signals):
        raise UnsupportedError(
            f"{name} scores with the CLS token, which this model's vision tower does not have.",
            "Use fopru-rank, which scores with the attention between patches, or divprune.",
        )
    budget = pruner.budget(features.layout)
    if features.tiling is None:
        if scope == "global":
            raise UsageError(
                "This model shows an image as one tile, so there is no choice among several.",
                "Leave --anyres-scope out.",
            )
        return budget
    if "valid" not in inspect.signature(pruner.select).parameters:
        raise UnsupportedError(
            f"{name} cannot tell the padding of a tile from the image: its `select` takes no `valid`.",
            "Add that argument to the method (see `visprune.pruning.base`), or use another method.",
        )
    if features.resamples and not all(SIGNALS[s].per_token for s in pruner.signals):
        raise UnsupportedError(
            f"{name} compares patches with each other, and this model mixes patches of large images or of "
            "videos.",
            "Use fopru-rank, which scores single patches, or divprune.",
        )
    if scope == "global" and not Traits.of(pruner).across_tiles:
        if methods.inside_asked is not None and not budget.prunable:
            name = methods.inside_asked.name
        raise UnsupportedError(
            f"{name} cannot choose among the tokens of all tiles at once.",
            "Leave --anyres-scope out, or use fopru-rank or fastervlm.",
        )
    asked = methods.inside_asked
    if asked is not None and asked.keep_tokens is not None:
        raise no_count(asked.name)
    return replace(budget, scope="image" if scope == "global" else "tile")
