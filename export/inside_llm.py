"""What an export does inside the LLM: the layers where it cuts the decoder, and the pruning between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.export_options import ExportOptions, MethodRequest, Methods
from visprune.export.fitprune.fitting import check_fit, fit_checkpoint
from visprune.export.graph.graph_specs import Cuts
from visprune.export.graph.segments import cuts_of, even_cuts
from visprune.export.scope import layer_pruning_for
from visprune.export.verify.compare import free_memory
from visprune.manifest import LayerPruning
from visprune.progress import Progress
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.recipe import Recipe, read_recipe

__all__ = ["Inside", "decide"]


@dataclass(frozen=True, slots=True)
class Inside:
    """The cuts of a decoder and what is pruned at them.

    Attributes:
        cuts: Where the decoder is cut.
        pruning: What is pruned there, for the manifest; None: nothing.
        recipe: The FitPrune recipe that decided it.
        is_open: Whether nothing is decided yet, because a recipe must be fitted and this is a dry run.
    """

    cuts: Cuts
    pruning: LayerPruning | None = None
    recipe: Recipe | None = None
    is_open: bool = False


def decide(
    methods: Methods,
    settings: ExportOptions,
    checkpoint: Checkpoint,
    config: Any,
    tokens: int,
    progress: Progress | None,
) -> Inside:
    """Decide what happens inside the LLM, and fit a recipe if one is needed.

    Args:
        methods: The methods asked for.
        settings: The other options.
        checkpoint: The model.
        config: Its configuration.
        tokens: Visual tokens of one image that enter the LLM.
        progress: Called as the work goes on; None in a dry run, which reads no weights.

    Raises:
        UsageError: More segments than layers, or a recipe of another model.
        UnsupportedError: The decoder cannot be cut, or the method cannot work on it.
    """
    text = config.text_config
    if methods.inside is None or methods.inside_asked is None:
        places = even_cuts(text.num_hidden_layers, 1 if settings.segments is None else settings.segments)
        if places:
            models.check_cut(text.model_type)
        return Inside(Cuts(places))
    models.check_cut(text.model_type)
    pruner, asked = methods.inside, methods.inside_asked
    recipe = None
    if isinstance(pruner, FitPrune) and not pruner.scheme:
        recipe = _recipe(settings, asked, checkpoint, text.num_hidden_layers, progress)
        if recipe is None:
            return Inside(Cuts(), is_open=True)
        pruner = FitPrune(recipe.scheme, recipe.visual_tokens, recipe.exported_ratio(recipe.scheme))
    pruning = layer_pruning_for(pruner, asked, text.num_hidden_layers, tokens)
    return Inside(Cuts(cuts_of(pruner, pruning.layers), pruner), pruning, recipe)


def _recipe(
    settings: ExportOptions,
    asked: MethodRequest,
    checkpoint: Checkpoint,
    num_layers: int,
    progress: Progress | None,
) -> Recipe | None:
    """Return the recipe of a file or a newly fitted one; None in a dry run that would have to fit one."""
    if settings.recipe is None:
        options = settings.fit_options(asked)
        if progress is None:
            check_fit(checkpoint, options)
            return None
        recipe = fit_checkpoint(checkpoint, options, progress)
        free_memory()
        return recipe
    recipe = read_recipe(settings.recipe)
    if progress is None:
        recipe.check_model(weights_sha256=recipe.weights_sha256, num_layers=num_layers, name=checkpoint.name)
        return recipe
    progress("checking the recipe's model", 0, 1)
    recipe.check_model(
        weights_sha256=checkpoint.weights_sha256(),
        num_layers=num_layers,
        name=checkpoint.name,
        adapters=settings.adapter or (),
    )
    progress("checking the recipe's model", 1, 1)
    return recipe
