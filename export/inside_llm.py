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
from visprune.export.models.parts import Features
from visprune.export.scope import layer_pruning_for
from visprune.export.verify.compare import free_memory
from visprune.manifest import LayerPruning
from visprune.progress import Progress
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.published import PublishedRecipe, open_recipe
from visprune.pruning.recipe import Recipe

__all__ = ["Inside", "decide"]


@dataclass(frozen=True, slots=True)
class Inside:
    """The cuts of a decoder and what is pruned at them.

    Attributes:
        cuts: Where the decoder is cut.
        pruning: What is pruned there, for the manifest; None: nothing.
        recipe: The FitPrune recipe that decided it, fitted or published.
        notes: What the user should know about that recipe.
        is_open: Whether nothing is decided yet, because a recipe must be fitted and this is a dry run.
    """

    cuts: Cuts
    pruning: LayerPruning | None = None
    recipe: Recipe | PublishedRecipe | None = None
    notes: tuple[str, ...] = ()
    is_open: bool = False


def decide(
    methods: Methods,
    settings: ExportOptions,
    checkpoint: Checkpoint,
    config: Any,
    features: Features,
    keep: int,
    progress: Progress | None,
) -> Inside:
    """Decide what happens inside the LLM, and fit a recipe if one is needed.

    Args:
        methods: The methods asked for.
        settings: The other options.
        checkpoint: The model.
        config: Its configuration.
        features: Which of its tokens are visual.
        keep: Visual tokens of one image, or of one tile, that the method before the LLM keeps.
        progress: Called as the work goes on; None in a dry run, which reads no weights.

    Raises:
        UsageError: More segments than layers, or a recipe of another model or of an unknown name.
        BundleError: The file of a recipe cannot be used.
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
    tokens, recipe = keep + features.always_kept, None
    notes: list[str] = []
    if isinstance(pruner, FitPrune) and not pruner.scheme:
        recipe = _recipe(settings, asked, checkpoint, text.num_hidden_layers, progress)
        if recipe is None:
            return Inside(Cuts(), is_open=True)
        pruner = recipe.pruner()
        if isinstance(recipe, PublishedRecipe):
            notes.append(recipe.note(checkpoint.name, tokens if features.tiling is None else None))
    pruning = layer_pruning_for(pruner, asked, text.num_hidden_layers, tokens)
    return Inside(Cuts(cuts_of(pruner, pruning.layers), pruner), pruning, recipe, tuple(notes))


def _recipe(
    settings: ExportOptions,
    asked: MethodRequest,
    checkpoint: Checkpoint,
    num_layers: int,
    progress: Progress | None,
) -> Recipe | PublishedRecipe | None:
    """Return the recipe asked for or a newly fitted one; None in a dry run that would have to fit one."""
    if settings.recipe is None:
        options = settings.fit_options(asked)
        if progress is None:
            check_fit(checkpoint, options)
            return None
        recipe = fit_checkpoint(checkpoint, options, progress)
        free_memory()
        return recipe
    opened = open_recipe(settings.recipe)
    adapters = settings.adapter or ()
    if isinstance(opened, PublishedRecipe):
        opened.check_layers(num_layers, checkpoint.name)
    elif progress is None:
        opened.check_layers(num_layers, checkpoint.name, adapters)
    else:
        progress("checking the recipe's model", 0, 1)
        opened.check_model(
            weights_sha256=checkpoint.weights_sha256(),
            num_layers=num_layers,
            name=checkpoint.name,
            adapters=adapters,
        )
        progress("checking the recipe's model", 1, 1)
    return opened
