"""The options of a quantization, and what they mean for one bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from visprune.errors import UnsupportedError, UsageError
from visprune.options import Option, documented
from visprune.targets import DTYPES, WIDTHS, Target

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BLOCK_SIZES",
    "FLOAT",
    "PARTS",
    "PRECISIONS",
    "RANGES",
    "STATIC",
    "WEIGHTS_ONLY",
    "QuantizeOptions",
    "Range",
    "ResolvedOptions",
    "resolve",
]

FLOAT = "float"
"""The precision of a part that is not quantized."""
PRECISIONS = ("int8", "int8-dynamic", "int8-weights", "fp8", "int4")
PARTS = ("vision", "projector", "decoder", "head")
BLOCK_SIZES = (32, 64, 128)
TENSORRT_BLOCK_SIZES = (64, 128)
"""Block sizes of int4 that TensorRT documents for weights."""

Range = Literal["search", "max", "percentile", "entropy"]
"""How the range of an activation is found; see `visprune.quantize.ranges`."""
RANGES: tuple[Range, ...] = ("search", "max", "percentile", "entropy")

STATIC = ("int8", "fp8")
"""Precisions that round activations to a fixed range, which is found on samples."""
WEIGHTS_ONLY = ("int8-weights", "int4")
"""Precisions that leave activations float."""

Part = Annotated[
    str | None,
    Option("Precision of this part; fp32 or fp16 leaves it float.", metavar="PRECISION"),
]


@documented
@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of a quantization. They are checked here as far as that is possible without a bundle.

    The parts are by default quantized to `precision`, and the output matrix of the language model (`head`) as
    its layers (`decoder`). For ONNX Runtime, the head of int4 and int8-dynamic decoders is int8-weights: it
    is computed for one token at a time, which this form does fastest, and errors in it count most.

    The error of a graph's output is relative (L2), on held-out samples; infinity is no limit.

    Raises:
        UsageError: An option has a value that is not offered.
    """

    precision: Annotated[
        str,
        Option("int8, int8-dynamic, int8-weights, fp8 or int4.", metavar="NAME", flags=("--precision", "-p")),
    ]
    calibration: Annotated[
        str | Path | None,
        Option(
            'Samples to find ranges on: lines of {"image": path, "prompt": text}.',
            metavar="FILE",
            shows="for the demo model a bundled set of 16",
        ),
    ] = None
    vision: Part = None
    projector: Part = None
    decoder: Part = None
    head: Part = None
    embedding: Annotated[
        str, Option("Precision of the token table: float, or int8 with a scale for each token.")
    ] = FLOAT
    block_size: Annotated[
        int, Option("For int4, the number of inputs that share a scale: 64 or 128; also 32 in ONNX Runtime.")
    ] = 128
    ranges: Annotated[
        Range,
        Option("How ranges of activations are found: search, max, percentile or entropy.", metavar="HOW"),
    ] = "search"
    smooth: Annotated[
        bool, Option("Move factors of channels from activations into weights (SmoothQuant, AWQ).")
    ] = True
    error_budget: Annotated[
        float, Option("Largest relative error of a graph's output. Above it, layers are left float.")
    ] = 0.1
    samples: Annotated[int | None, Option("Number of samples to draw.", metavar="N", shows="all")] = None
    seed: Annotated[int, Option("Seed to draw samples with.")] = 0
    max_skipped: Annotated[float, Option("Largest share of samples that may have unreadable images.")] = 0.0
    timing: Annotated[bool, Option("Time both bundles on this machine.")] = True
    force: Annotated[bool, Option("Replace an existing bundle.")] = False

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
        import numpy as np

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
        "head": options.head or _head(decoder, platform),
    }
    parts = {part: _float_or_precision(part, precision, dtype) for part, precision in wanted.items()}
    chosen = {**parts, "embedding": options.embedding}
    if all(precision == FLOAT for precision in chosen.values()):
        raise UsageError("Every part is to stay float.", "Give a precision to at least one.")
    for part, precision in parts.items():
        if precision != FLOAT and precision not in platform.quantized:
            raise _unsupported(precision, part, platform.name, platform.quantized)
    if (
        "int4" in parts.values()
        and platform.builds_engines
        and options.block_size not in TENSORRT_BLOCK_SIZES
    ):
        raise UnsupportedError(
            f"TensorRT has no int4 in blocks of {options.block_size} (target {platform.name}).",
            f"Give --block-size {' or '.join(map(str, TENSORRT_BLOCK_SIZES))}, or leave it out.",
        )
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


def _head(decoder: str, platform: Target) -> str:
    """Return the precision of the head that goes with one of the decoder."""
    if decoder in ("int4", "int8-dynamic") and "int8-weights" in platform.quantized:
        return "int8-weights"
    return decoder


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
        "int8-dynamic": "TensorRT needs ranges that are known beforehand",
        "int8-weights": "the operator is ONNX Runtime's own",
    }[precision]
    return UnsupportedError(
        f"The target {name} cannot take {precision} (for {part}): {why}.",
        f"It takes: {', '.join(offered)}.",
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"There is no {name} {value!r}.", f"Give one of: {', '.join(allowed)}.")
