"""How long a stage of a model takes at least, by the work it does and the bytes it moves.

    seconds = max( linear / (linear rate) + attention / (attention rate),  bytes / (byte rate) )

`linear` is the work of all matrix products with weights, a multiply and an add for each weight and token;
`attention` that of queries with keys and of probabilities with values, which keeps its float type when
weights are quantized. `bytes` are the weights, read once, and the cache: keys and values are read, and where
the new ones are joined to them, copied. What passes between operators is left to the rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visprune.estimate.flops import (
    TokenCounts,
    head_macs,
    in_unit,
    patch_embedding_macs,
    projector_macs,
    tower_macs,
)
from visprune.estimate.planned_model import Subject

__all__ = [
    "PRECISIONS",
    "Estimate",
    "Rates",
    "Stage",
    "Work",
    "cache_bytes",
    "estimate",
    "weight_bytes",
    "works",
]

PRECISIONS = ("fp32", "fp16", "fp8", "int8", "int8-dynamic", "int4")
"""What linear layers compute with or, of int4, are stored with; most exact first."""

Stage = Literal["vision", "projector", "prefill", "decode"]

_BLOCK = 32  # weights that share a scale in int4, as `visprune quantize` makes them
_CACHE_PASSES = 3  # read by attention; read and written where new keys and values are joined to the old


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of a stage does.

    Attributes:
        stage: Its name; "decode" is one token.
        linear: FLOP of products with weights.
        attention: FLOP of attention's own products.
        bytes: Read from memory, and written to the cache.
    """

    stage: Stage
    linear: int
    attention: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches.

    Attributes:
        linear: FLOP a second in products with weights.
        attention: FLOP a second in attention's own.
        bytes: Bytes a second.
    """

    linear: float
    attention: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a stage, and which of the two it waits for."""

    stage: Stage
    seconds: float
    binds: Literal["FLOPs", "bytes"]


def estimate(work: Work, rates: Rates) -> Estimate:
    """The time of a stage by the formula of this module."""
    computing = work.linear / rates.linear + work.attention / rates.attention
    moving = work.bytes / rates.bytes
    return Estimate(work.stage, max(computing, moving), "FLOPs" if computing >= moving else "bytes")


def weight_bytes(precision: str, item_size: int) -> float:
    """Bytes of one weight of a linear layer, scales of int4 included; those of a channel do not count.

    Args:
        precision: One of `PRECISIONS`.
        item_size: Bytes of a float where it runs.
    """
    sizes = {"fp32": 4.0, "fp16": 2.0, "int4": 0.5 + item_size / _BLOCK}
    return sizes.get(precision, 1.0)


def cache_bytes(subject: Subject, tokens: TokenCounts, more: int, item_size: int) -> int:
    """Bytes of keys and values after the prefill and so many tokens more."""
    return tokens.schedule.plus(more).cache_bytes(subject.num_kv_heads, subject.head_dim, item_size)


def works(
    subject: Subject, tokens: TokenCounts, new_tokens: int, precision: str, item_size: int
) -> tuple[Work, ...]:
    """The work of each stage; that of decoding is a token's in the middle of the answer.

    Args:
        subject: The model.
        tokens: Of the prompt, those of text in `entering` and in every layer of `schedule`.
        new_tokens: Of the answer.
        precision: Of all linear layers.
        item_size: Bytes of a float where it runs.
    """
    shapes, schedule = subject.shapes, tokens.schedule
    width, per_weight = shapes.hidden_size, weight_bytes(precision, item_size)
    seen = tokens.tiles * 2 * shapes.vision_layers * shapes.vision_tokens**2 * shapes.vision_hidden_size
    encoded = tokens.tiles * (patch_embedding_macs(shapes) + tower_macs(shapes)) - seen

    layer, head = subject.layer_weights, head_macs(shapes)
    before = width * (width + 2 * subject.num_kv_heads * subject.head_dim)  # queries, keys and values
    pairs = list(zip(schedule.entering, schedule.staying, strict=True))
    prefill = sum(n * before + left * (layer - before) for n, left in pairs) + head
    square = sum(2 * n * n * width for n in schedule.entering)
    decoder, middle = shapes.num_layers * layer + head, new_tokens // 2
    row = sum(2 * n * width for n in schedule.plus(middle).entering)
    filled, longer = (cache_bytes(subject, tokens, more, item_size) for more in (0, middle))

    def work(stage: Stage, linear: int, attention: int, weights: int, cache: int = 0) -> Work:
        return Work(
            stage, in_unit(linear, "FLOP"), in_unit(attention, "FLOP"), int(weights * per_weight) + cache
        )

    return (
        work("vision", encoded, seen, subject.tower_weights),
        work("projector", projector_macs(shapes, tokens.projected), 0, projector_macs(shapes, 1)),
        work("prefill", prefill, square, decoder, filled),
        work("decode", decoder, row, decoder, _CACHE_PASSES * longer),
    )
