"""What an engine gives: tensors that stay on the GPU until someone asks for their content."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.runtime.backends.device import Block, Device

__all__ = ["Array", "CacheArray", "RankedLogits"]


class Array:
    """A tensor on the GPU.

    Args:
        device: The GPU.
        block: Where its content is.
        shape: Its dimensions.
        dtype: Of NumPy.
    """

    def __init__(self, device: Device, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.dtype = dtype
        self._device = device
        self._shape = shape

    def shape(self) -> tuple[int, ...]:
        """The dimensions."""
        return self._shape

    def numpy(self) -> NDArray[Any]:
        """A copy in host memory."""
        content = self._device.download(self.block, prod(self._shape) * self.dtype.itemsize)
        return content.view(self.dtype).reshape(self._shape)


class CacheArray(Array):
    """Keys or values of one layer, [1, Hkv, P, Dh], in a buffer of C tokens that is written in place.

    The next step's value has the same buffer, so of several only the last is whole; what an earlier one
    held is at the beginning of it, unless that was cut off in between.

    Args:
        device: The GPU.
        block: The buffer, [1, Hkv, C, Dh].
        buffer_shape: [1, Hkv, C, Dh].
        dtype: Of NumPy.
        length: P.
    """

    def __init__(
        self, device: Device, block: Block, buffer_shape: tuple[int, ...], dtype: np.dtype[Any], length: int
    ) -> None:
        super().__init__(device, block, buffer_shape, dtype)
        self.buffer_shape = buffer_shape
        self.length = length

    def shape(self) -> tuple[int, ...]:
        """The dimensions of what it holds."""
        return (*self.buffer_shape[:2], self.length, self.buffer_shape[3])

    def numpy(self) -> NDArray[Any]:
        """A copy of what it holds, in host memory."""
        return np.ascontiguousarray(super().numpy()[:, :, : self.length])

    def cropped(self, length: int) -> CacheArray:
        """The first tokens of it, in the same buffer."""
        return CacheArray(self._device, self.block, self.buffer_shape, self.dtype, length)


class RankedLogits(Array):
    """Logits [1, 1, V] whose largest the GPU has found.

    Args:
        logits: The logits.
        token: The index of the largest, [1] int64; -1 where they cannot be used.
    """

    def __init__(self, logits: Array, token: Array) -> None:
        super().__init__(logits._device, logits.block, logits.shape(), logits.dtype)
        self._token = token

    def argmax(self) -> int:
        """The index of the largest, the first of equals; -1 where they hold NaN or +inf, or -inf only."""
        return int(self._token.numpy()[0])
