"""Which graphs a model becomes: for each its module, inputs and outputs.

The names of dimensions are the glossary's: T tiles, N visual tokens of a tile, K kept, M kept in the
whole prompt, B batch, S new positions, P past, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visprune.export import graphs, models
from visprune.export.parts import Features, Parts, cache_shape
from visprune.export.trace import GraphInput
from visprune.pruning.base import VisionPruner

__all__ = ["GraphPlan", "plan"]

# Example sizes of the dynamic dimensions; none is 0 or 1, which a tracer would take for constants.
_T, _S, _P, _M = 2, 5, 3, 7


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """One graph to make."""

    name: str
    build: Callable[[Parts], nn.Module]
    inputs: Sequence[GraphInput | list[GraphInput]]
    outputs: dict[str, dict[int, str]]


def plan(config: Any, features: Features, pruner: VisionPruner, dtype: torch.dtype) -> list[GraphPlan]:
    """The graphs of a model pruned before the LLM, in the order they run."""
    text, vision = config.text_config, config.vision_config
    tower = models.tower(vision.model_type)
    signals = pruner.signals
    count = features.layout.visual_tokens
    width = vision.hidden_size * len(features.layer_counts)
    size = features.image_size
    pixels = GraphInput("pixel_values", (_T, features.channels, size, size), dtype, {0: "T"})
    tokens = GraphInput("vision_features", (_T, features.always_kept + count, width), dtype, {0: "T"})
    scores = [GraphInput(name, (_T, count), torch.float32, {0: "T"}) for name in signals]
    visual = GraphInput("image_features", (_M, text.hidden_size), dtype, {0: "M"})
    heads, head_dim = cache_shape(text)
    cache = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    return [
        GraphPlan(
            "vision_encoder",
            lambda parts: graphs.VisionEncoder(parts, tower, features, signals),
            [pixels],
            {"image_features": {0: "T"}, **{name: {0: "T"} for name in signals}},
        ),
        GraphPlan(
            "token_pruner",
            lambda parts: graphs.TokenPruner(parts, features, pruner),
            [tokens, GraphInput("keep_tokens", (), torch.int64, {}), scores],
            {"image_features": {0: "M"}, "keep_indices": {0: "T", 1: "K"}},
        ),
        GraphPlan(
            "embedding",
            lambda parts: graphs.Embedding(parts, config.image_token_id),
            [GraphInput("input_ids", (1, _S), torch.int64, {1: "S"}), visual],
            {"inputs_embeds": {1: "S"}},
        ),
        GraphPlan(
            "decoder_model_merged",
            graphs.Decoder,
            [
                GraphInput("inputs_embeds", (1, _S, text.hidden_size), dtype, {1: "S"}),
                GraphInput("position_ids", (1, _S), torch.int64, {1: "S"}),
                [
                    GraphInput(f"past_key_values.{n}", (1, heads, _P, head_dim), dtype, {2: "P"})
                    for n in cache
                ],
            ],
            {"logits": {}, **{f"present.{name}": {2: "P + S"} for name in cache}},
        ),
    ]
