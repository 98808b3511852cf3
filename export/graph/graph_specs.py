"""The specification of each graph that a model becomes: its module, inputs and outputs.

Dimensions have the names of the glossary: T tiles, N visual tokens of a tile, K kept tokens of a tile, M kept
tokens of the whole prompt, B batch, S new positions, P past positions, D hidden size, V vocabulary, R
newlines of an image, J tokens from which one token is resampled, Q tokens of a question, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from visprune.export import models
from visprune.export.graph import graphs, segments
from visprune.export.graph.graphs import TokenPruner
from visprune.export.graph.tiles import TilePruner
from visprune.export.graph.trace import GraphInput
from visprune.export.models.parts import Features, Parts, cache_shape
from visprune.pruning.base import LayerPruner, RatingPruner, Traits, VisionPruner
from visprune.pruning.signals import SIGNALS, SignalSizes

__all__ = ["Cuts", "GraphSpec", "graph_specs", "pruner_module"]

# Example sizes of the dynamic dimensions. None is 0 or 1, which the tracer would treat as constants.
_T, _S, _P, _M, _R, _J, _Q = 2, 5, 3, 7, 3, 4, 6


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The specification of one graph.

    Attributes:
        name: Name of the graph and of its files.
        build: Makes the module that is traced from the parts of a model.
        inputs: In the order of the module's `forward`; a list stands for an argument that is a list.
        outputs: Names in order, each with the names of its dynamic dimensions by axis.
    """

    name: str
    build: Callable[[Parts], nn.Module]
    inputs: Sequence[GraphInput | list[GraphInput]]
    outputs: dict[str, dict[int, str]]


@dataclass(frozen=True, slots=True)
class Cuts:
    """How a decoder is cut into segments.

    Attributes:
        places: Where it is cut, in half layers (see `segments`).
        pruner: The method that prunes at each of these places; None if none does.
    """

    places: tuple[int, ...] = ()
    pruner: LayerPruner | None = None

    @property
    def rating(self) -> RatingPruner | None:
        """The method, if it chooses raters."""
        return self.pruner if isinstance(self.pruner, RatingPruner) else None

    @property
    def marks(self) -> tuple[str, ...]:
        """Marks of each token, [B, S] bool, that the embedding puts out and the prune points pass on."""
        return ("is_visual",) * (self.pruner is not None) + ("is_rater",) * (self.rating is not None)


def graph_specs(
    config: Any,
    features: Features,
    pruner: VisionPruner,
    cuts: Cuts,
    dtype: torch.dtype,
    scope: Literal["image", "tile"] = "image",
) -> list[GraphSpec]:
    """Return the specifications of a model's graphs, in the order in which the graphs run.

    Args:
        config: Configuration of the checkpoint.
        features: Which tokens are visual.
        pruner: The method before the LLM.
        cuts: How the decoder is cut.
        dtype: Dtype of the weights.
        scope: Whether the method chooses among the tokens of a whole image or of each tile, if images are
            tiled.
    """
    text, vision = config.text_config, config.vision_config
    tower = models.tower(vision.model_type)
    signals, traits = pruner.signals, Traits.of(pruner)
    count = features.layout.visual_tokens
    width = vision.hidden_size * len(features.layer_counts)
    pixels, tokens = _image_inputs(features, pruner, width, dtype)
    heads = vision.num_attention_heads
    sizes = SignalSizes(count, width, heads, vision.hidden_size // heads)
    scores = [
        GraphInput(name, (_T, *SIGNALS[name].shape(sizes)), torch.float32, {0: "T"}) for name in signals
    ]
    chosen = {1: "K"} if features.tiling is not None and scope == "image" else {0: "T", 1: "K"}
    weights = {"merge_weights": {0: "T", 1: "K"}} if traits.merges else {}
    asked = GraphInput("question_embeds", (1, _Q, text.hidden_size), dtype, {1: "Q"})
    question: list[GraphInput] = [asked] if traits.needs_text else []
    visual = GraphInput("image_features", (_M, text.hidden_size), dtype, {0: "M"})
    return [
        GraphSpec(
            "vision_encoder",
            lambda parts: graphs.VisionEncoder(parts, tower, features, signals, resizes=traits.resizes),
            [pixels],
            {"image_features": tokens.dims, **{name: {0: "T"} for name in signals}},
        ),
        GraphSpec(
            "token_pruner",
            partial(pruner_module, features=features, pruner=pruner, scope=scope),
            [
                tokens,
                GraphInput("keep_tokens", (), torch.int64, {}),
                *_tile_inputs(features, pruner),
                question,
                scores,
            ],
            {"image_features": {0: "M"}, "keep_indices": chosen, **weights},
        ),
        GraphSpec(
            "embedding",
            lambda parts: graphs.Embedding(
                parts, config.image_token_id, tell_visual=cuts.pruner is not None, rating=cuts.rating
            ),
            [GraphInput("input_ids", (1, _S), torch.int64, {1: "S"}), visual],
            {name: {1: "S"} for name in ("inputs_embeds", *cuts.marks)},
        ),
        *_decoder(text, cuts, dtype),
    ]


def pruner_module(
    parts: Parts, features: Features, pruner: VisionPruner, scope: Literal["image", "tile"]
) -> TokenPruner | TilePruner:
    """Return the module that prunes one image before the LLM."""
    if features.tiling is None:
        return TokenPruner(parts, features, pruner)
    return TilePruner(parts, features, pruner, scope)


def _image_inputs(
    features: Features, pruner: VisionPruner, width: int, dtype: torch.dtype
) -> tuple[GraphInput, GraphInput]:
    """Return the pixels that the vision encoder takes, and the features that the pruner takes."""
    side, edge, tokens = features.side, features.image_size, features.always_kept
    pixel_dims, token_dims = {0: "T"}, {0: "T"}
    if Traits.of(pruner).resizes:
        # The example is smaller than the tower's own size, so that the tracer does not take that for granted.
        side, edge = max(2, side // 2), max(2, side // 2) * features.patch_size
        pixel_dims, token_dims = {0: "T", 2: "H", 3: "W"}, {0: "T", 1: "N"}
    count = side * side - features.skipped_patches
    pixels = GraphInput("pixel_values", (_T, features.channels, edge, edge), dtype, pixel_dims)
    return pixels, GraphInput("vision_features", (_T, tokens + count, width), dtype, token_dims)


def _tile_inputs(features: Features, pruner: VisionPruner) -> list[GraphInput | list[GraphInput]]:
    """Return the pruner's additional inputs for tiled images."""
    if features.tiling is None:
        return []
    slots, dims = (_T, features.layout.visual_tokens), {0: "T"}
    if pruner.budget(features.layout).unit == "square":
        side = max(2, features.side // 2)
        slots, dims = (_T, side * side), {0: "T", 1: "N" if Traits.of(pruner).resizes else "K"}
    resampling = [
        GraphInput("token_sources", (*slots, _J), torch.int64, {**dims, 2: "J"}),
        GraphInput("token_weights", (*slots, _J), torch.float32, {**dims, 2: "J"}),
    ]
    return [
        GraphInput("token_places", slots, torch.int64, dims),
        GraphInput("newline_places", (_R,), torch.int64, {0: "R"}),
        GraphInput("image_tokens", (), torch.int64, {}),
        resampling if features.resamples else [],
    ]


def _decoder(text: Any, cuts: Cuts, dtype: torch.dtype) -> list[GraphSpec]:
    """Return the graph of the whole decoder, or its segments and the graph that prunes between them."""
    hidden = ("inputs_embeds", "hidden_states")
    tokens = [GraphInput(name, (1, _S, text.hidden_size), dtype, {1: "S"}) for name in hidden]
    positions = GraphInput("position_ids", (1, _S), torch.int64, {1: "S"})
    marks = [GraphInput(name, (1, _S), torch.bool, {1: "S"}) for name in cuts.marks]
    scores = GraphInput("token_scores", (1, _S), torch.float32, {1: "S"})
    spans = segments.spans(text.num_hidden_layers, cuts.places)
    if len(spans) == 1:
        past, present = _cache(text, range(text.num_hidden_layers), dtype)
        merged: dict[str, dict[int, str]] = {"logits": {}} | present
        return [GraphSpec("decoder_model_merged", graphs.Decoder, [tokens[0], positions, past], merged)]
    found = []
    for index, span in enumerate(spans):
        is_last = index == len(spans) - 1
        pruner = None if is_last else cuts.pruner
        past, present = _cache(text, segments.attention_layers(span), dtype)
        outputs: dict[str, dict[int, str]] = {"logits": {}} if is_last else {"last_hidden_state": {1: "S"}}
        outputs |= {"token_scores": {1: "S"}} if pruner else {}
        found.append(
            GraphSpec(
                f"decoder_segment_{index}",
                partial(segments.Segment, span=span, pruner=pruner),
                [tokens[min(index, 1)], positions, past, *(marks if pruner else [])],
                outputs | present,
            )
        )
    if cuts.pruner:
        count = GraphInput("keep_tokens", (), torch.int64, {})
        gathered = ("hidden_states", "position_ids", *cuts.marks)
        found.append(
            GraphSpec(
                "segment_pruner",
                lambda parts: segments.SegmentPruner(),
                [tokens[1], positions, marks[0], scores, count, *marks[1:]],
                {name: {1: "kept"} for name in (*(f"kept_{name}" for name in gathered), "keep_indices")},
            )
        )
    return found


def _cache(
    text: Any, layers: Sequence[int], dtype: torch.dtype
) -> tuple[list[GraphInput], dict[str, dict[int, str]]]:
    """Return the cache inputs and outputs of some layers, named by the layers' indices in the decoder."""
    heads, head_dim = cache_shape(text)
    names = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    past = [GraphInput(f"past_key_values.{n}", (1, heads, _P, head_dim), dtype, {2: "P"}) for n in names]
    return past, {f"present.{name}": {2: "P + S"} for name in names}
