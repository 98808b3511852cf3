"""What each deployment target can take.

The native flavour keeps `Attention`, `RMSNormalization` and `RotaryEmbedding` as single operators
(opset 23): ONNX Runtime and TensorRT from 10.15 have kernels for them. The primitive flavour spells
them out at opset 19, for TensorRT 10.3, the version on JetPack 6.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["TARGETS", "Target", "target"]

Flavour = Literal["native", "primitive"]
DType = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class Target:
    """A platform to export for.

    Attributes:
        flavour: How graphs are spelled.
        opset: ONNX operator set.
        dtype: Of weights and activations unless the user asks for another.
        about: One line for people.
    """

    name: str
    flavour: Flavour
    opset: int
    dtype: DType
    about: str


TARGETS = {
    t.name: t
    for t in (
        Target("onnxruntime", "native", 23, "float32", "ONNX Runtime on a CPU or an NVIDIA GPU"),
        Target("jetpack6", "primitive", 19, "float16", "Jetson Orin with JetPack 6 (TensorRT 10.3)"),
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
