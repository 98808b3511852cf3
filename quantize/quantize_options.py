"""What a user may choose, and whether a bundle can take it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visprune.errors import UnsupportedError, UsageError
from visprune.quantize.ranges import RANGES, Range
from visprune.targets import DTYPES, WIDTHS, Target

__all__ = ["BLOCK_SIZES", "FLOAT", "PARTS", "PRECISIONS", "QuantizeOptions", "Settings", "resolve"]

FLOAT = "float"
PRECISIONS = ("int8", "int8-dynamic", "fp8", "int4")
PARTS = ("vision", "projector", "decoder", "head")
BLOCK_SIZES = (32, 64, 128)

_STATIC = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of `quantize`, checked as far as they can be without a bundle.

    Attributes:
        precision: Of every part that is not named: int8, int8-dynamic, fp8, int4.
        vision: Of the vision encoder; a precision, or fp32, fp16 or float to leave it as it is.
        projector: Likewise; by default as `precision`.
        decoder: Likewise, of the language model's layers.
        head: Likewise, of its output matrix; by default as the decoder.
        embedding: Of the token table: float or int8, a scale for each token.
        calibration: JSONL file of pictures and prompts; for the demo model a bundled one.
        max_skipped: Largest share of its lines whose pictures may be unreadable.
        samples: Draw so many of them; all by default.
        seed: To draw them with.
        ranges: How the range of an activation is found.
        smooth: Whether factors for each channel are moved from activations into weights.
        block_size: Inputs that share a scale, for int4.
        error_budget: Largest relative error (L2) of a graph's output on held-out samples. While there is
            more, the most sensitive int8 and fp8 layers are left float. Infinity is no limit.
        timing: Whether both bundles are timed.
        force: Whether an existing bundle is replaced.

    Raises:
        UsageError: An option that means nothing.
    """

    precision: str
    vision: str | None = None
    projector: str | None = None
    decoder: str | None = None
    head: str | None = None
    embedding: str = FLOAT
    calibration: str | Path | None = None
    max_skipped: float = 0.0
    samples: int | None = None
    seed: int = 0
    ranges: Range = "search"
    smooth: bool = True
    block_size: int = 32
    error_budget: float = 0.1
    timing: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        for part in PARTS:
            chosen = getattr(self, part)
            if chosen is not None:
                _one_of(part, chosen, (*PRECISIONS, *DTYPES, FLOAT))
        _one_of("embedding", self.embedding, (FLOAT, "int8"))
        _one_of("ranges", self.ranges, RANGES)
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"The block size {self.block_size} is not offered.",
                f"Give one of: {', '.join(map(str, BLOCK_SIZES))}.",
            )
        if not 0.0 <= self.max_skipped < 1.0:
            raise UsageError(
                f"The share {self.max_skipped:g} is outside [0, 1).", "Give for example 0.1 for a tenth."
            )
        if not self.error_budget > 0.0:
            raise UsageError(
                f"The error budget {self.error_budget:g} is not positive.", "Give for example 0.1 for 10%."
            )


@dataclass(frozen=True, slots=True)
class Settings:
    """The options as they are for one bundle: see `resolve`.

    Attributes:
        parts: Precision of each part.
        dtype: The float type of the bundle.
        ranges, smooth, block_size: As in the options.
        for_engines: Whether TensorRT will read the graphs, and not ONNX Runtime.
    """

    parts: dict[str, str]
    dtype: str
    ranges: Range
    smooth: bool
    block_size: int
    for_engines: bool = False

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of scales."""
        return np.dtype(self.dtype)

    @property
    def needs_samples(self) -> bool:
        """Whether a part has ranges that only samples can tell."""
        return any(self.parts[part] in _STATIC for part in PARTS)

    @property
    def uses_samples(self) -> bool:
        """Whether samples make a part better."""
        return self.needs_samples or "int4" in self.parts.values()


def resolve(options: QuantizeOptions, platform: Target, dtype: str) -> Settings:
    """What the options mean for a bundle of this target and float type.

    Raises:
        UsageError: A part is to stay in a float type that the bundle has not, or nothing is to be quantized.
        UnsupportedError: The target cannot take a precision.
    """
    decoder = options.decoder or options.precision
    asked = {
        "vision": options.vision or options.precision,
        "projector": options.projector or options.precision,
        "decoder": decoder,
        "head": options.head or decoder,
    }
    parts = {part: _kept(part, precision, dtype) for part, precision in asked.items()}
    chosen = {**parts, "embedding": options.embedding}
    if all(precision == FLOAT for precision in chosen.values()):
        raise UsageError("Every part is to stay float.", "Give a precision to at least one.")
    for part, precision in parts.items():
        if precision != FLOAT and precision not in platform.quantized:
            raise _not_here(precision, part, platform.name, platform.quantized)
    if options.embedding != FLOAT and platform.builds_engines:
        raise UnsupportedError(
            f"The token table cannot be int8 for the target {platform.name}: TensorRT looks up floats only.",
            "Leave --embedding out.",
        )
    if "int8-dynamic" in parts.values() and dtype != "float32":
        raise UnsupportedError(
            f"int8-dynamic computes in float32, and this bundle is {dtype}.",
            "Export it with --dtype fp32, or quantize with --precision int8.",
        )
    rest = (options.ranges, options.smooth, options.block_size, platform.builds_engines)
    return Settings(chosen, dtype, *rest)


def _kept(part: str, precision: str, dtype: str) -> str:
    """A precision, where fp32 and fp16 are names for what the bundle has."""
    wanted = DTYPES.get(precision)
    if wanted is None:
        return precision
    if wanted != dtype:
        has = WIDTHS[dtype]
        raise UsageError(
            f"The part {part} cannot stay {precision}: this bundle is {has}.",
            f"Say {has}, or export the model with --dtype {precision}.",
        )
    return FLOAT


def _not_here(precision: str, part: str, name: str, offered: tuple[str, ...]) -> UnsupportedError:
    why = {
        "fp8": "its GPU has no 8-bit floating point, which begins with SM89",
        "int4": "4-bit weights are not proven with its TensorRT",
        "int8-dynamic": "TensorRT needs ranges that are known beforehand",
    }[precision]
    return UnsupportedError(
        f"The target {name} cannot take {precision} (for {part}): {why}.",
        f"It takes: {', '.join(offered)}.",
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"There is no {name} {value!r}.", f"Give one of: {', '.join(allowed)}.")
