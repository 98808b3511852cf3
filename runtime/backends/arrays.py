"""Outputs of an engine: tensors that stay on the GPU until their content is asked for."""

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
        block: Memory that holds the content.
        shape: Dimensions.
        dtype: NumPy dtype.
    """

    def __init__(self, device: Device, block: Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.dtype = dtype
        self._device = device
        self._shape = shape

    def shape(self) -> tuple[int, ...]:
        """Return the dimensions."""
        return self._shape

    def numpy(self) -> NDArray[Any]:
        """Copy the content to host memory."""
        content = self._device.download(self.block, prod(self._shape) * self.dtype.itemsize)
        return content.view(self.dtype).reshape(self._shape)


class CacheArray(Array):
    """Keys or values of one layer, [1, Hkv, P, Dh], in a buffer of C tokens that is written in place.

    The values of successive steps share one buffer, so only the last one is sure to be intact. The tokens of
    an earlier one are the first of the buffer, unless the cache was cropped below them in between.

    Args:
        device: The GPU.
        block: Memory of the buffer.
        buffer_shape: [1, Hkv, C, Dh].
        dtype: Of NumPy.
        length: P, the number of tokens that the buffer holds.
    """

    shareable = False

    def __init__(
        self, device: Device, block: Block, buffer_shape: tuple[int, ...], dtype: np.dtype[Any], length: int
    ) -> None:
        super().__init__(device, block, buffer_shape, dtype)
        self.buffer_shape = buffer_shape
        self.length = length

    def shape(self) -> tuple[int, ...]:
        """Return [1, Hkv, P, Dh], the dimensions without the unused part of the buffer."""
        return (*self.buffer_shape[:2], self.length, self.buffer_shape[3])

    def numpy(self) -> NDArray[Any]:
        """Copy the tokens that it holds to host memory."""
        return np.ascontiguousarray(super().numpy()[:, :, : self.length])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.block.size

    def cropped(self, length: int) -> CacheArray:
        """Return the first tokens, in the same buffer."""
        return CacheArray(self._device, self.block, self.buffer_shape, self.dtype, length)


class RankedLogits(Array):
    """Logits [1, 1, V] with the index of the largest, which the GPU has computed.

    Args:
        logits: The logits.
        token: Index of the largest logit, [1] int64; -1 if the logits cannot be used.
    """

    def __init__(self, logits: Array, token: Array) -> None:
        super().__init__(logits._device, logits.block, logits.shape(), logits.dtype)
        self._token = token

    def argmax(self) -> int:
        """Return the index of the largest logit, the first of equals; -1 for NaN, +inf, or -inf only."""
        return int(self._token.numpy()[0])
