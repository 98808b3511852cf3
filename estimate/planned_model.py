"""Models that a plan is made for: the sizes that cost depends on, without pruning and with it.

A pruned model is an existing bundle, or an unpruned model with the pruning that an export would give it. The
unpruned ones come from `find_model`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.token_schedule import TokenCounts, count_tokens
from visprune.export.export_options import ExportOptions
from visprune.export.models.parts import Features
from visprune.export.scope import layer_pruning_for, pruning_for
from visprune.manifest import LayerPruning, Manifest, Pruning
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.published import PublishedRecipe, open_recipe
from visprune.runtime.vision.kept_tokens import Keep, keep_for
from visprune.targets import WIDTHS
from visprune.tiling import Tiling
from visprune.work import LayerWork, Shapes

__all__ = ["ModelSizes", "PrunedModel", "UnprunedModel", "bundle_model", "prune"]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model, which no pruning changes.

    Attributes:
        name: Name of the model, for people.
        shapes: Sizes of its matrices.
        num_kv_heads: Heads of the decoder that have keys and values of their own.
        head_dim: Size of a head.
        context_length: The most tokens that the decoder takes.
    """

    name: str
    shapes: Shapes
    num_kv_heads: int
    head_dim: int
    context_length: int

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one decoder layer: 2 d^2 + 2 d h + 2 or 3 d m.

        Here h is the width of the keys, `num_kv_heads` x `head_dim`. Computed from `LayerWork`, in which a
        token costs a MAC for each weight and 2 n d for attention, less the weights that heads save by
        sharing keys and values.
        """
        d, shapes = self.shapes.hidden_size, self.shapes
        one = LayerWork(d, shapes.intermediate_size, shapes.convention).layer(1) - 2 * d
        return one - 2 * d * (d - self.num_kv_heads * self.head_dim)

    @property
    def tower_weights(self) -> int:
        """Numbers in the matrices of the vision tower: layers, patch embedding, and what else it has."""
        d, shapes = self.shapes.vision_hidden_size, self.shapes
        one = LayerWork(d, shapes.vision_intermediate_size, "F2").layer(1) - 2 * d
        return shapes.vision_layers * one + shapes.patch_values * d + shapes.vision_other.weights


@dataclass(frozen=True, slots=True)
class UnprunedModel:
    """A model before anything is pruned.

    Attributes:
        sizes: Its sizes.
        features: Which tokens of the vision tower are visual.
    """

    sizes: ModelSizes
    features: Features


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """A model with its pruning.

    Attributes:
        sizes: Its sizes.
        tiling: How pictures become tiles; None for a model that does not tile them.
        pruning: Pruning before the LLM.
        inside: Pruning inside the LLM; None if there is none.
        precision: Precision of a bundle, where all its parts have the same; None where it is to be chosen.
        notes: What is assumed about the pruning.
    """

    sizes: ModelSizes
    tiling: Tiling | None
    pruning: Pruning
    inside: LayerPruning | None
    precision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> str:
        """The sentence about kept tokens that every command prints."""
        return Keep(self.pruning.keep_tokens).sentence(self.pruning, self.inside, self.tiling)

    @property
    def takes_ratios(self) -> bool:
        """Whether another ratio can be asked for: not of a recipe, nor where nothing is pruned."""
        inside = self.inside
        return self.pruning.budget.prunable or (inside is not None and not inside.budget.is_recipe)

    def at(self, ratio: float) -> PrunedModel:
        """Return the model with another ratio, of the method before the LLM if it has one.

        Raises:
            UsageError: The method cannot prune to this ratio.
        """
        if self.inside is None or self.pruning.budget.prunable:
            keep = self.pruning.budget.from_ratio(ratio)
            return replace(self, pruning=replace(self.pruning, keep_tokens=keep))
        return replace(self, inside=replace(self.inside, budget=replace(self.inside.budget, ratio=ratio)))

    def tokens(self, text_tokens: int, size: tuple[int, int] | None = None) -> TokenCounts:
        """Count the tokens of a prompt of one image and text; text counts in `entering` and every layer.

        Args:
            text_tokens: Text tokens of the prompt.
            size: Height and width of the image in pixels, for a model that tiles it; if None, the size that
                makes the most tiles.
        """
        layers, keep = self.sizes.shapes.num_layers, self.pruning.keep_tokens
        found = count_tokens(layers, self.pruning, self.inside, self.tiling, keep=keep, size=size)
        schedule = found.schedule.plus(text_tokens)
        return replace(found, entering=found.entering + text_tokens, schedule=schedule)


def bundle_model(
    manifest: Manifest, name: str, *, ratio: float | None = None, keep_tokens: int | None = None
) -> PrunedModel:
    """Return the model of a bundle, at the bundle's ratio or another.

    Args:
        manifest: The bundle's manifest.
        name: Name of the bundle, for people.
        ratio: Fraction of the visual tokens to keep, as in `visprune run`.
        keep_tokens: Number of visual tokens to keep, instead of a ratio.

    Raises:
        UsageError: The bundle cannot keep this ratio or number.
        UnsupportedError: The manifest does not have the model's shapes.
    """
    keep, inside = keep_for(manifest, ratio=ratio, keep_tokens=keep_tokens), manifest.layer_pruning
    if inside is not None and keep.layer_ratio is not None:
        inside = replace(inside, budget=replace(inside.budget, ratio=keep.layer_ratio))
    if manifest.shapes is None:
        raise UnsupportedError(
            f"{name} does not say its model's shapes: it is older, or its decoder has experts.",
            "Export it again with this visprune, or plan for its model.",
        )
    decoder, quantized = manifest.decoder, manifest.quantization
    parts = quantized.parts if quantized else {}
    found = {parts[part] for part in ("vision", "projector", "decoder", "head") if parts}
    own = WIDTHS[manifest.dtype]
    return PrunedModel(
        sizes=ModelSizes(
            name, manifest.shapes, decoder.num_kv_heads, decoder.head_dim, decoder.context_length
        ),
        tiling=manifest.tiling,
        pruning=replace(manifest.pruning, keep_tokens=keep.tokens),
        inside=inside,
        precision=own if not found else found.pop() if len(found) == 1 else None,
    )


def prune(model: UnprunedModel, options: ExportOptions) -> PrunedModel:
    """Return a model with the pruning that an export with these options would give it.

    Raises:
        UsageError: The options do not go together; or fitprune without a recipe, which only data can give.
        UnsupportedError: The method cannot work on this model.
    """
    methods, sizes = options.methods(), model.sizes
    pruning = pruning_for(methods, model.features)
    inside = None
    notes: list[str] = []
    if methods.inside is not None and methods.inside_asked is not None:
        layers, pruner = sizes.shapes.num_layers, methods.inside
        entering = pruning.keep_tokens + pruning.always_kept
        if isinstance(pruner, FitPrune) and not pruner.scheme:
            if options.recipe is None:
                raise UsageError(
                    "How many tokens fitprune deletes at each layer is in its recipe, and none is given.",
                    "Fit one with `visprune fit`, and give it with --recipe.",
                )
            recipe = open_recipe(options.recipe)
            recipe.check_layers(layers, sizes.name)
            if isinstance(recipe, PublishedRecipe):
                notes.append(recipe.note(sizes.name, entering if model.features.tiling is None else None))
            pruner = recipe.pruner()
        inside = layer_pruning_for(pruner, methods.inside_asked, layers, entering)
    return PrunedModel(sizes, model.features.tiling, pruning, inside, notes=tuple(notes))
