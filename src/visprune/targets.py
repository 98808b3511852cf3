"""What each deployment target can take: a row of a table for each.

The native flavour keeps `Attention`, `RMSNormalization` and `RotaryEmbedding` as single operators
(opset 23): ONNX Runtime and TensorRT from 10.15 have kernels for them. The primitive flavour spells
them out at opset 19, for TensorRT 10.3, the version on JetPack 6.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UnsupportedError, UsageError

__all__ = ["FP8_SM", "TARGETS", "Target", "check_sm", "target"]

Flavour = Literal["native", "primitive"]
DType = Literal["float32", "float16"]

FP8_SM = 89
"""The first SM with 8-bit floating point: 89 is Ada (RTX 40)."""


@dataclass(frozen=True, slots=True)
class Target:
    """A platform to export for.

    Attributes:
        flavour: How graphs are spelled.
        opset: ONNX operator set.
        dtype: Of weights and activations unless the user asks for another.
        about: One line for people.
        sms: SMs that it may run on, as TensorRT names them (86 is 8.6); empty where no engine is built.
        quantized: The precisions that its graphs can be quantized to.
    """

    name: str
    flavour: Flavour
    opset: int
    dtype: DType
    about: str
    sms: tuple[int, ...]
    quantized: tuple[str, ...]

    @property
    def builds_engines(self) -> bool:
        """Whether TensorRT reads its graphs, and not ONNX Runtime."""
        return bool(self.sms)


TARGETS = {
    t.name: t
    for t in (
        Target(
            "onnxruntime",
            "native",
            23,
            "float32",
            "ONNX Runtime on a CPU or an NVIDIA GPU",
            (),
            ("int8", "int8-dynamic", "fp8", "int4"),
        ),
        Target(
            "jetpack6",
            "primitive",
            19,
            "float16",
            "Jetson Orin with JetPack 6 (TensorRT 10.3)",
            (87,),
            ("int8",),
        ),
        Target(
            "rtx",
            "native",
            23,
            "float16",
            "NVIDIA RTX GPUs (TensorRT-RTX)",
            (75, 80, 86, 89, 120, 121),
            ("int8", "fp8", "int4"),
        ),
    )
}


def target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known targets: {', '.join(TARGETS)}."
        raise UsageError(f"There is no target {name!r}.", hint)
    return TARGETS[name]


def check_sm(precisions: tuple[str, ...], sm: int) -> None:
    """Refuse what a GPU has no arithmetic for, before an engine is built.

    Args:
        precisions: Of the parts of a bundle.
        sm: Its SM, such as 86.

    Raises:
        UnsupportedError: fp8 before SM89.
    """
    if "fp8" in precisions and sm < FP8_SM:
        raise UnsupportedError(
            f"SM{sm} has no fp8: that begins with SM{FP8_SM}.",
            "Quantize with --precision int8 for this GPU.",
        )
