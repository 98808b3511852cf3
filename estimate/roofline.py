"""Roofline: the least time that a stage of a model takes, from its work and the bytes it moves.

    seconds = max( linear / (linear rate) + attention / (attention rate),  bytes / (byte rate) )

`linear` is the work of all matrix products with weights: a multiply and an add for each weight and token.
`attention` is the work of the products of queries with keys and of probabilities with values, which stay in
floating point when weights are quantized. `bytes` are the weights, which are read once, and the cache: keys
and values are read, and copied where the new ones are joined to them. Tensors that pass between operators are
not counted; they lower the rates that are reached.

A stage is compute-bound if the first side is larger, and memory-bound otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visprune.estimate.flops import head_macs, in_unit, patch_embedding_macs, projector_macs, tower_macs
from visprune.estimate.planned_model import ModelSizes
from visprune.estimate.token_schedule import TokenCounts

__all__ = [
    "PRECISIONS",
    "Binds",
    "Estimate",
    "Rates",
    "Stage",
    "StageWork",
    "cache_bytes",
    "estimate",
    "stage_works",
    "weight_bytes",
]

PRECISIONS = ("fp32", "fp16", "fp8", "int8", "int8-dynamic", "int4")
"""Precisions of linear layers, most exact first; int4 stores weights that are used in floating point."""

Stage = Literal["vision", "projector", "prefill", "decode"]

Binds = Literal["FLOPs", "bytes"]
"""What limits a stage: its work (compute-bound), or the bytes that it moves (memory-bound)."""

_BLOCK = 128  # int4 weights that share a scale, as `visprune quantize` writes them
_CACHE_PASSES = 3  # attention reads the cache; joining new keys and values to the old reads and writes it


@dataclass(frozen=True, slots=True)
class StageWork:
    """Work and traffic of one run of a stage.

    Attributes:
        stage: Name of the stage; "decode" is one token.
        linear: FLOP of products with weights.
        attention: FLOP of the products of attention itself.
        bytes: Bytes read from memory, and written to the cache.
    """

    stage: Stage
    linear: int
    attention: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of a device.

    Attributes:
        linear: FLOP a second in products with weights.
        attention: FLOP a second in the products of attention itself.
        bytes: Bytes a second.
    """

    linear: float
    attention: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated seconds of a stage, and what limits it."""

    stage: Stage
    seconds: float
    binds: Binds


def estimate(work: StageWork, rates: Rates) -> Estimate:
    """Estimate the time of a stage by the formula of this module."""
    computing = work.linear / rates.linear + work.attention / rates.attention
    moving = work.bytes / rates.bytes
    return Estimate(work.stage, max(computing, moving), "FLOPs" if computing >= moving else "bytes")


def weight_bytes(precision: str, item_size: int) -> float:
    """Return the bytes of one weight of a linear layer, with its share of an int4 scale.

    Other precisions have one scale for each output channel, which is too little to count.

    Args:
        precision: One of `PRECISIONS`.
        item_size: Bytes of a floating-point number on the device.
    """
    sizes = {"fp32": 4.0, "fp16": 2.0, "int4": 0.5 + item_size / _BLOCK}
    return sizes.get(precision, 1.0)


def cache_bytes(sizes: ModelSizes, tokens: TokenCounts, more: int, item_size: int) -> int:
    """Return the bytes of keys and values after the prefill and a number of further tokens."""
    return tokens.schedule.plus(more).cache_bytes(sizes.num_kv_heads, sizes.head_dim, item_size)


def stage_works(
    sizes: ModelSizes, tokens: TokenCounts, new_tokens: int, precision: str, item_size: int
) -> tuple[StageWork, ...]:
    """Return the work of each stage. "decode" is one token in the middle of the answer.

    Args:
        sizes: Sizes of the model.
        tokens: Tokens of the prompt, those of text included in `entering` and in every layer of `schedule`.
        new_tokens: Tokens of the answer.
        precision: Precision of all linear layers.
        item_size: Bytes of a floating-point number on the device.
    """
    shapes, schedule = sizes.shapes, tokens.schedule
    width, per_weight = shapes.hidden_size, weight_bytes(precision, item_size)
    tower = shapes.with_patches(tokens.patches)
    seen = tokens.tiles * 2 * tower.vision_layers * tower.vision_tokens**2 * tower.vision_hidden_size
    encoded = tokens.tiles * (patch_embedding_macs(tower) + tower_macs(tower)) - seen

    layer, head = sizes.layer_weights, head_macs(shapes)
    before = width * (width + 2 * sizes.num_kv_heads * sizes.head_dim)  # queries, keys and values
    pairs = list(zip(schedule.entering, schedule.staying, strict=True))
    prefill = sum(n * before + left * (layer - before) for n, left in pairs) + head
    square = sum(2 * n * n * width for n in schedule.entering)
    decoder, middle = shapes.num_layers * layer + head, new_tokens // 2
    row = sum(2 * n * width for n in schedule.plus(middle).entering)
    filled, longer = (cache_bytes(sizes, tokens, more, item_size) for more in (0, middle))

    def work(stage: Stage, linear: int, attention: int, weights: int, cache: int = 0) -> StageWork:
        return StageWork(
            stage, in_unit(linear, "FLOP"), in_unit(attention, "FLOP"), int(weights * per_weight) + cache
        )

    return (
        work("vision", encoded, seen, sizes.tower_weights),
        work("projector", projector_macs(shapes, tokens.projected), 0, projector_macs(shapes, 1)),
        work("prefill", prefill, square, decoder, filled),
        work("decode", decoder, row, decoder, _CACHE_PASSES * longer),
    )
