"""The options of a quantization, and what they mean for one bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visprune.errors import UnsupportedError, UsageError
from visprune.quantize.ranges import RANGES, Range
from visprune.targets import DTYPES, WIDTHS, Target

__all__ = [
    "BLOCK_SIZES",
    "FLOAT",
    "PARTS",
    "PRECISIONS",
    "STATIC",
    "QuantizeOptions",
    "ResolvedOptions",
    "resolve",
]

FLOAT = "float"
"""The precision of a part that is not quantized."""
PRECISIONS = ("int8", "int8-dynamic", "fp8", "int4")
PARTS = ("vision", "projector", "decoder", "head")
BLOCK_SIZES = (32, 64, 128)

STATIC = ("int8", "fp8")
"""Precisions that round activations to a fixed range, which is found on samples."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of `quantize`. They are checked here as far as that is possible without a bundle.

    Attributes:
        precision: Precision of every part without an option of its own: int8, int8-dynamic, fp8 or int4.
        vision: Precision of the vision encoder, or fp32, fp16 or float to leave it float; by default
            `precision`.
        projector: Precision of the projector, likewise.
        decoder: Precision of the layers of the language model, likewise.
        head: Precision of the output matrix of the language model, likewise; by default that of the decoder.
        embedding: Precision of the token table: float, or int8 with a scale for each token.
        calibration: JSONL file of images and prompts; by default, for the demo model only, a bundled one.
        max_skipped: Largest share of its lines that may be left out because their images are unreadable.
        samples: Number of samples to draw from it; all by default.
        seed: Seed to draw them with.
        ranges: How the range of an activation is found; see `visprune.quantize.ranges`.
        smooth: Whether factors of channels are moved from activations into weights (SmoothQuant, AWQ).
        block_size: Inputs that share a scale, for int4.
        error_budget: Largest relative error (L2) of a graph's output on held-out samples. Above it, the most
            sensitive int8 and fp8 layers are left float until the error is within it. Infinity: no limit.
        timing: Whether both bundles are timed.
        force: Whether an existing bundle is replaced.

    Raises:
        UsageError: An option has a value that is not offered.
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
class ResolvedOptions:
    """The options as they apply to one bundle; see `resolve`.

    Attributes:
        parts: Precision of each part, the token table ("embedding") included.
        dtype: Float type of the bundle.
        ranges: See `QuantizeOptions`.
        smooth: See `QuantizeOptions`.
        block_size: See `QuantizeOptions`.
        for_engines: Whether the graphs are for TensorRT, and not for ONNX Runtime.
    """

    parts: dict[str, str]
    dtype: str
    ranges: Range
    smooth: bool
    block_size: int
    for_engines: bool = False

    @property
    def numpy_dtype(self) -> np.dtype:
        """Float type of the bundle, which scales have too, as NumPy has it."""
        return np.dtype(self.dtype)

    @property
    def needs_samples(self) -> bool:
        """Whether a part needs samples, to find ranges of its activations."""
        return any(self.parts[part] in STATIC for part in PARTS)

    @property
    def uses_samples(self) -> bool:
        """Whether a part needs samples, or is more exact with them (int4, for AWQ)."""
        return self.needs_samples or "int4" in self.parts.values()


def resolve(options: QuantizeOptions, platform: Target, dtype: str) -> ResolvedOptions:
    """Resolve options for a bundle.

    Args:
        options: The options.
        platform: The target of the bundle.
        dtype: The float type of the bundle.

    Raises:
        UsageError: A part is to stay in a float type that is not the bundle's, or no part is to be quantized.
        UnsupportedError: The target does not support a precision.
    """
    decoder = options.decoder or options.precision
    wanted = {
        "vision": options.vision or options.precision,
        "projector": options.projector or options.precision,
        "decoder": decoder,
        "head": options.head or decoder,
    }
    parts = {part: _float_or_precision(part, precision, dtype) for part, precision in wanted.items()}
    chosen = {**parts, "embedding": options.embedding}
    if all(precision == FLOAT for precision in chosen.values()):
        raise UsageError("Every part is to stay float.", "Give a precision to at least one.")
    for part, precision in parts.items():
        if precision != FLOAT and precision not in platform.quantized:
            raise _unsupported(precision, part, platform.name, platform.quantized)
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
    return ResolvedOptions(
        chosen, dtype, options.ranges, options.smooth, options.block_size, platform.builds_engines
    )


def _float_or_precision(part: str, precision: str, dtype: str) -> str:
    """Return a precision, or `FLOAT` if it is a name of the bundle's float type, such as fp32."""
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


def _unsupported(precision: str, part: str, name: str, offered: tuple[str, ...]) -> UnsupportedError:
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
