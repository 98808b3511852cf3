"""Where a tensor of a checkpoint is on disk, whatever the format of its file.

No tensor is read here. A tensor may also be defined as the result of a computation on stored ones, which runs
when the tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from visprune.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BYTES", "ComputedTensor", "StoredTensor", "TensorSource", "check_dtype"]

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
BYTES = _FLOATS | {"I64": 8, "I32": 4, "BOOL": 1}
"""Bytes of an element of each dtype that a checkpoint may have, by the dtype's name in safetensors."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        name: Name in the file.
        file: The file that holds it.
        offset: Position of its first byte in the file.
        length: Number of bytes from its first to its last element.
        dtype: Dtype by its name in safetensors, such as F16 or BF16.
        shape: Its dimensions.
        strides: Elements from one index to the next in each dimension; None if its elements follow each
            other in the order of their indices.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that is computed from others whenever it is read.

    Attributes:
        name: Name for messages.
        sources: The tensors that are read for it, at least one. Its dtype is that of the first.
        shape: Its dimensions.
        compute: Computes its values, in any dtype, from those of the sources.
    """

    name: str
    sources: tuple[TensorSource, ...]
    shape: tuple[int, ...]
    compute: Callable[[Sequence[Tensor]], Tensor]

    @property
    def file(self) -> Path:
        """The file that holds its first source."""
        return self.sources[0].file

    @property
    def dtype(self) -> str:
        """Dtype by its name in safetensors."""
        return self.sources[0].dtype

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


TensorSource: TypeAlias = StoredTensor | ComputedTensor


def check_dtype(file: Path, name: str, dtype: str) -> None:
    """Refuse a dtype that plain weights do not have; buffers such as `position_ids` may be integers.

    Raises:
        UnsupportedError: The dtype is not in `BYTES`, or a weight is not of floating-point numbers.
    """
    is_weight = name.endswith((".weight", ".bias"))
    if dtype in _FLOATS or (dtype in BYTES and not is_weight):
        return
    kind = "which is not a floating-point type" if dtype in BYTES else "which quantized weights have"
    raise UnsupportedError(
        f"The tensor {name} in {file} is of type {dtype}, {kind}, and cannot be exported.",
        "Take the checkpoint in float32, float16 or bfloat16; a quantized one can often be had unquantized.",
    )
