"""What a plan must know of a model: its shapes, how its pictures become tokens, and what is pruned.

A model is a bundle, a checkpoint (of which only `config.json` is read), or one of `KNOWN`, whose numbers
stand here so that a plan needs neither network nor PyTorch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.estimate.flops import TokenCounts, count_tokens
from visprune.export.export_options import ExportOptions
from visprune.export.models.parts import Features
from visprune.export.scope import layer_pruning_for, pruning_for
from visprune.manifest import MANIFEST, LayerPruning, Manifest, Pruning
from visprune.optional import require
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.recipe import read_recipe
from visprune.runtime.vision.kept_tokens import Keep, keep_for
from visprune.targets import WIDTHS, target
from visprune.tiling import Tiling
from visprune.work import LayerWork, Shapes

__all__ = ["KNOWN", "Sizes", "Subject", "find_sizes", "of_bundle", "prune"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model before anything is pruned.

    Attributes:
        name: As the user gave it.
        shapes: Sizes of its matrices.
        num_kv_heads: Heads of the decoder that have keys and values of their own.
        head_dim: Size of one.
        context_length: Most tokens that the decoder takes.
        features: Which tokens of the vision tower are visual.
    """

    name: str
    shapes: Shapes
    num_kv_heads: int
    head_dim: int
    context_length: int
    features: Features


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its pruning.

    Attributes:
        name, shapes, num_kv_heads, head_dim, context_length: As in `Sizes`.
        tiling: How a picture becomes tiles, if it does.
        pruning: Before the LLM.
        inside: In the LLM, if anything is pruned there.
        precision: What a bundle has, if it is one of `roofline.PRECISIONS` throughout; None where that is
            to be chosen.
    """

    name: str
    shapes: Shapes
    num_kv_heads: int
    head_dim: int
    context_length: int
    tiling: Tiling | None
    pruning: Pruning
    inside: LayerPruning | None
    precision: str | None = None

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one decoder layer: 2 d^2 + 2 d h + 2 or 3 d m, h the width of its keys.

        By `LayerWork`, in which a token costs a MAC for each weight and 2 n d for attention; less what keys
        and values that heads share save.
        """
        d, shapes = self.shapes.hidden_size, self.shapes
        one = LayerWork(d, shapes.intermediate_size, shapes.convention).layer(1) - 2 * d
        return one - 2 * d * (d - self.num_kv_heads * self.head_dim)

    @property
    def tower_weights(self) -> int:
        """Numbers in the matrices of the vision tower's layers, and in its patch embedding."""
        d, shapes = self.shapes.vision_hidden_size, self.shapes
        one = LayerWork(d, shapes.vision_intermediate_size, "F2").layer(1) - 2 * d
        return shapes.vision_layers * one + shapes.patch_values * d

    @property
    def kept(self) -> str:
        """The sentence of every command."""
        return Keep(self.pruning.keep_tokens).sentence(self.pruning, self.inside, self.tiling)

    @property
    def prunes_before(self) -> bool:
        """Whether a ratio is that of the method before the LLM, and not of the one inside it."""
        return self.inside is None or self.pruning.budget.prunable

    @property
    def takes_ratios(self) -> bool:
        """Whether another ratio can be had: not of a recipe, nor where nothing is pruned."""
        inside = self.inside
        return self.pruning.budget.prunable or (inside is not None and not inside.budget.is_recipe)

    def at(self, ratio: float) -> Subject:
        """The same at another ratio.

        Raises:
            UsageError: It cannot be had.
        """
        if self.inside is None or self.prunes_before:
            keep = self.pruning.budget.from_ratio(ratio)
            return replace(self, pruning=replace(self.pruning, keep_tokens=keep))
        return replace(self, inside=replace(self.inside, budget=replace(self.inside.budget, ratio=ratio)))

    def tokens(self, text_tokens: int, size: tuple[int, int] | None = None) -> TokenCounts:
        """Tokens of a prompt of one image and text on their way; those of text count in every layer.

        Args:
            text_tokens: Beside the image.
            size: Height and width of the image in pixels, for a model that tiles it; if None the size that
                makes the most tiles.
        """
        layers, keep = self.shapes.num_layers, self.pruning.keep_tokens
        found = count_tokens(layers, self.pruning, self.inside, self.tiling, keep=keep, size=size)
        schedule = found.schedule.plus(text_tokens)
        return TokenCounts(found.tiles, found.projected, found.entering + text_tokens, schedule)


def of_bundle(
    manifest: Manifest, name: str, *, ratio: float | None = None, keep_tokens: int | None = None
) -> Subject:
    """The subject that a bundle is, at its own ratio or another.

    Raises:
        UsageError: A ratio or a count that the bundle cannot keep.
        UnsupportedError: It does not say its model's shapes.
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
    return Subject(
        name=name,
        shapes=manifest.shapes,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        context_length=decoder.context_length,
        tiling=manifest.tiling,
        pruning=replace(manifest.pruning, keep_tokens=keep.tokens),
        inside=inside,
        precision=own if not found else found.pop() if len(found) == 1 else None,
    )


def prune(sizes: Sizes, options: ExportOptions) -> Subject:
    """A model with the pruning that an export with the same options would give it.

    Raises:
        UsageError: The options do not go together; or fitprune without a recipe, which only data can give.
        UnsupportedError: The method cannot work on this model.
    """
    methods = options.methods()
    pruning = pruning_for(methods, sizes.features)
    inside = None
    if methods.inside is not None and methods.inside_asked is not None:
        layers, pruner = sizes.shapes.num_layers, methods.inside
        if isinstance(pruner, FitPrune) and not pruner.scheme:
            if options.recipe is None:
                raise UsageError(
                    "Where fitprune deletes how much is in its recipe, and none is given.",
                    "Fit one with `visprune fit`, and give it with --recipe.",
                )
            recipe = read_recipe(options.recipe)
            recipe.check_model(weights_sha256=recipe.weights_sha256, num_layers=layers, name=sizes.name)
            pruner = FitPrune(recipe.scheme, recipe.visual_tokens, recipe.exported_ratio(recipe.scheme))
        entering = pruning.keep_tokens + pruning.always_kept
        inside = layer_pruning_for(pruner, methods.inside_asked, layers, entering)
    return Subject(
        name=sizes.name,
        shapes=sizes.shapes,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        context_length=sizes.context_length,
        tiling=sizes.features.tiling,
        pruning=pruning,
        inside=inside,
    )


def find_sizes(model: str | None) -> Sizes:
    """The sizes of a model by its name or directory; None is the bundled demo model.

    Raises:
        CheckpointError: It cannot be found, or its configuration cannot be read.
        UnsupportedError: It is of a kind that cannot be exported.
        MissingExtraError: It is a checkpoint, and the `export` extra is missing.
    """
    if model is not None and not Path(model).exists():
        if model in KNOWN:
            return KNOWN[model]
        return _of_checkpoint(_config_of(model), model)
    if model is None:
        from visprune.bundled import DEMO, MODEL_DIR

        return _of_checkpoint(MODEL_DIR, DEMO)
    return _of_checkpoint(Path(model), Path(model).resolve().name)


def _config_of(hub_id: str) -> Path:
    """The directory of the config.json of a hub id, from the cache or the hub."""
    known = f"known without a network: {', '.join(KNOWN)}."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise CheckpointError(
            f"There is no directory {hub_id}, and it is not a hub id.", f"Give a directory, or an id; {known}"
        )
    require("huggingface_hub", extra="export")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, "config.json")).parent
    except Exception as error:  # the hub's client raises many kinds, and each means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"The config.json of {hub_id} is not in the hub's cache and could not be downloaded: {reason}",
            f"Check the id and the network, or give a directory; {known}",
        ) from None


def _of_checkpoint(path: Path, name: str) -> Sizes:
    """By the configuration in a directory; no weight need be there."""
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json and no {MANIFEST}.",
            "Give the directory of a Hugging Face checkpoint, or of a bundle.",
        )
    for module in ("torch", "transformers"):
        require(module, extra="export")
    import torch

    from visprune.export import models
    from visprune.export.checkpoint import loading
    from visprune.export.checkpoint.checkpoint import Checkpoint
    from visprune.export.graph import weightless
    from visprune.export.models.parts import cache_shape

    loading.silence_transformers()
    config: Any = loading.load_config(Checkpoint(name, path, "", (), 0, 0))
    features = models.family(config.model_type).features(config)
    bare, _ = weightless.skeleton(config, config.model_type, target("onnxruntime"), torch.float32)
    shapes = loading.shapes(bare, features)
    if shapes is None:
        raise UnsupportedError(
            f"The decoder of {name} has experts or other MLPs that no formula here counts.",
            "Export it and measure it.",
        )
    text = config.text_config
    return Sizes(name, shapes, *cache_shape(text), text.max_position_embeddings, features)


@dataclass(frozen=True, slots=True)
class _Tower:
    """A vision tower with patches of 14 pixels; `layers` of it run."""

    hidden: int
    mlp: int
    layers: int
    prefix: int
    size: int


@dataclass(frozen=True, slots=True)
class _Llm:
    hidden: int
    mlp: int
    layers: int
    kv_heads: int
    vocabulary: int
    context: int
    head_dim: int = 128


_CLIP = _Tower(1024, 4096, 23, 1, 336)
_SIGLIP = _Tower(1152, 4304, 26, 0, 384)
_VICUNA_7B = _Llm(4096, 11008, 32, 32, 32064, 4096)
_VICUNA_13B = _Llm(5120, 13824, 40, 40, 32064, 4096)
_MISTRAL_7B = _Llm(4096, 14336, 32, 8, 32064, 32768)
_QWEN2_05B = _Llm(896, 4864, 24, 2, 152000, 32768, 64)
_QWEN2_7B = _Llm(3584, 18944, 28, 4, 152128, 32768)

_NEXT = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 24)
_ONEVISION = Tiling(
    tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)), 384, 27, 9, "whole"
)


def _known(name: str, tower: _Tower, llm: _Llm, tiling: Tiling | None = None) -> Sizes:
    side = tower.size // 14
    return Sizes(
        name,
        Shapes(
            vision_hidden_size=tower.hidden,
            vision_intermediate_size=tower.mlp,
            vision_layers=tower.layers,
            vision_tokens=side * side + tower.prefix,
            vision_patches=side * side,
            patch_values=3 * 14 * 14,
            projector=((tower.hidden, llm.hidden), (llm.hidden, llm.hidden)),
            hidden_size=llm.hidden,
            intermediate_size=llm.mlp,
            num_layers=llm.layers,
            vocab_size=llm.vocabulary,
        ),
        llm.kv_heads,
        llm.head_dim,
        llm.context,
        Features((tower.layers,), tower.prefix, tower.prefix, side, tower.size, 3, tiling),
    )


KNOWN = {
    sizes.name: sizes
    for sizes in (
        _known("llava-hf/llava-1.5-7b-hf", _CLIP, _VICUNA_7B),
        _known("llava-hf/llava-1.5-13b-hf", _CLIP, _VICUNA_13B),
        _known("llava-hf/llava-v1.6-vicuna-7b-hf", _CLIP, _VICUNA_7B, _NEXT),
        _known("llava-hf/llava-v1.6-vicuna-13b-hf", _CLIP, _VICUNA_13B, _NEXT),
        _known("llava-hf/llava-v1.6-mistral-7b-hf", _CLIP, _MISTRAL_7B, _NEXT),
        _known("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP, _QWEN2_05B, _ONEVISION),
        _known("llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP, _QWEN2_7B, _ONEVISION),
    )
}
