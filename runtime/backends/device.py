"""The first NVIDIA GPU: its memory, one stream, and CUDA graphs captured from that stream.

This is the only file that calls CUDA, through the driver API of cuda-bindings. All work is on one stream, so
a block of memory can be reused as soon as no object holds it: work that is queued later also runs later.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.cores import available_memory
from visprune.errors import MemoryShortageError, MissingExtraError, UnsupportedError
from visprune.optional import have, require
from visprune.units import in_bytes

__all__ = ["Block", "Device", "DeviceMemoryError", "Recording"]

_STAGING = 8 << 20  # bytes of the pinned buffer through which host and device exchange data
_LEAST = 512  # bytes of the smallest block: even an empty tensor needs an address


class DeviceMemoryError(MemoryShortageError):
    """The GPU has too little free memory; `needed` is in bytes, or None if unknown."""

    def __init__(self, needed: int | None, free: int) -> None:
        lacking = "which is too little" if needed is None else f"and {in_bytes(needed)} more are needed"
        super().__init__(
            f"The GPU has {in_bytes(free)} of free memory, {lacking}.",
            "Load with --low-memory, build with a smaller --max-cache, or quantize the bundle.",
        )


class Block:
    """Device memory, which is returned to its device when the object is deleted."""

    __slots__ = ("_device", "address", "size")

    def __init__(self, device: Device, address: int, size: int) -> None:
        self._device = device
        self.address = address
        self.size = size

    def __del__(self) -> None:
        self._device.give(self.address, self.size)


class Recording:
    """A captured CUDA graph. It repeats the captured work with the same shapes at the same addresses."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device = device
        self._handle = handle

    def launch(self) -> None:
        """Queue the graph on the stream."""
        self._device.call("cuGraphLaunch", self._handle, self._device.stream)

    def close(self) -> None:
        """Free the graph."""
        self._device.call("cuGraphExecDestroy", self._handle)


class Device:
    """The GPU that CUDA lists first.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        UnsupportedError: There is no driver, or no GPU.
    """

    def __init__(self) -> None:
        if not have("cuda.bindings.driver"):
            raise MissingExtraError(
                "The package 'cuda-bindings' is not installed.",
                'Install it with: pip install cuda-bindings; on a Jetson: pip install "visprune[jetson]".',
            )
        self._driver = require("cuda.bindings.driver", extra="tensorrt")
        self.make_room: Callable[[], bool] = lambda: False
        """Called when memory is full. It frees some and returns True, or returns False."""
        self._idle: dict[int, list[int]] = defaultdict(list)  # free addresses by size; the last is used first
        self._scratch: Block | None = None
        self._start()
        (self._gpu,) = self.call("cuDeviceGet", 0)
        (self._context,) = self.call("cuDevicePrimaryCtxRetain", self._gpu)  # TensorRT uses it too
        self.enter()
        kinds = self._driver.CUdevice_attribute
        major = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.sm = 10 * major + minor
        """Compute capability: 86 stands for 8.6."""
        self._shares_memory = bool(self._attribute(kinds.CU_DEVICE_ATTRIBUTE_INTEGRATED))
        (self._stream,) = self.call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)
        """Handle of the stream."""
        (pinned,) = self.call("cuMemAllocHost", _STAGING)
        self._pinned = int(pinned)
        self._staging = np.ctypeslib.as_array((ctypes.c_uint8 * _STAGING).from_address(self._pinned))
        self._staged = 0  # bytes of the staging buffer that the stream may still read

    def enter(self) -> None:
        """Make the GPU's context current in this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        """Return the bytes that can be allocated, including blocks kept for reuse."""
        self.enter()
        idle = sum(size * len(addresses) for size, addresses in self._idle.items())
        free = int(self.call("cuMemGetInfo")[0])
        if self._shares_memory:  # CUDA does not count what the system can reclaim, such as cached files
            free = max(free, available_memory() or 0)
        return free + idle

    def take(self, size: int, wanted: int = 0) -> Block:
        """Allocate memory. Its content is undefined.

        Args:
            size: Bytes.
            wanted: Address that is preferred if it is free, because captured work needs the same addresses
                again.

        Raises:
            DeviceMemoryError: There is too little memory.
        """
        size = _rounded(size)
        if idle := self._idle.get(size):
            return Block(self, idle.pop(idle.index(wanted) if wanted in idle else -1), size)
        while (address := self._allocate(size)) is None:
            if not self.trim() and not self.make_room():
                raise DeviceMemoryError(size, self.free_memory())
        return Block(self, address, size)

    def scratch(self, size: int) -> Block:
        """Return working memory for the next run. All runs share it, because they run one after another.

        Raises:
            DeviceMemoryError: There is too little memory.
        """
        if self._scratch is None or self._scratch.size < size:
            self._scratch = None  # freed first, because the larger one may need its memory
            self._scratch = self.take(size)
        return self._scratch

    def give(self, address: int, size: int) -> None:
        """Take a block back and keep it for reuse."""
        self._idle[size].append(address)

    def trim(self) -> bool:
        """Free the blocks that are kept for reuse. Return whether there were any."""
        idle, self._idle = self._idle, defaultdict(list)
        addresses = [address for of_size in idle.values() for address in of_size]
        if addresses:
            self.synchronize()
        for address in addresses:
            self.call("cuMemFree", address)
        return bool(addresses)

    def upload(self, source: NDArray[Any], block: Block) -> None:
        """Copy an array to the beginning of a block; the array may change as soon as this returns."""
        content = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        for begin in range(0, content.size, _STAGING):
            piece = content[begin : begin + _STAGING]
            if self._staged + piece.size > _STAGING:
                self.synchronize()
            place = self._staged
            self._staging[place : place + piece.size] = piece
            self._staged += piece.size
            self.call(
                "cuMemcpyHtoDAsync", block.address + begin, self._pinned + place, piece.size, self._stream
            )

    def download(self, block: Block, count: int) -> NDArray[np.uint8]:
        """Copy the first bytes of a block to host memory, [count]."""
        self.enter()
        self.synchronize()
        content = np.empty(count, np.uint8)
        for begin in range(0, count, _STAGING):
            size = min(_STAGING, count - begin)
            self.call("cuMemcpyDtoHAsync", self._pinned, block.address + begin, size, self._stream)
            self.synchronize()
            content[begin : begin + size] = self._staging[:size]
        return content

    def clear(self, block: Block) -> None:
        """Fill a block with zeros."""
        self.call("cuMemsetD8Async", block.address, 0, block.size, self._stream)

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self.call("cuStreamSynchronize", self._stream)
        self._staged = 0

    def record(self, work: Callable[[], None]) -> Recording:
        """Capture the work that a function queues on the stream, without running it.

        Raises:
            UnsupportedError: The work cannot be captured.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._driver.cuStreamEndCapture(self._stream)  # fails too, but makes the stream usable again
            raise
        (graph,) = self.call("cuStreamEndCapture", self._stream)
        try:
            (handle,) = self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)
        return Recording(self, handle)

    def release(self) -> None:
        """Free all memory that is kept for reuse."""
        self.enter()
        self._scratch = None
        self.trim()

    def __del__(self) -> None:
        with suppress(Exception):  # the constructor may have failed, or the interpreter may be shutting down
            self.release()
            self.call("cuMemFreeHost", self._pinned)
            self.call("cuStreamDestroy", self._stream)

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the driver API and return its results, without the error code.

        Raises:
            UnsupportedError: The call failed.
        """
        error, *values = getattr(self._driver, name)(*arguments)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise _failed(f"{name}: {getattr(error, 'name', error)}")
        return tuple(values)

    def _start(self) -> None:
        """Initialise CUDA, and refuse a machine without a driver or a GPU."""
        try:
            (error,) = self._driver.cuInit(0)
        except RuntimeError:  # cuda-bindings found no libcuda
            raise UnsupportedError(
                "There is no NVIDIA driver.",
                "Install the GPU's driver (`visprune doctor` shows what is found), or use --provider cpu.",
            ) from None
        codes = self._driver.CUresult
        if error == codes.CUDA_SUCCESS and self.call("cuDeviceGetCount")[0] > 0:
            return
        if error in (codes.CUDA_SUCCESS, codes.CUDA_ERROR_NO_DEVICE):
            raise UnsupportedError(
                "There is no NVIDIA GPU that CUDA can use.",
                "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --provider cpu.",
            )
        raise _failed(f"cuInit: {getattr(error, 'name', error)}")

    def _attribute(self, kind: Any) -> int:
        return int(self.call("cuDeviceGetAttribute", kind, self._gpu)[0])

    def _allocate(self, size: int) -> int | None:
        """Return the address of new memory, or None if the memory is full."""
        error, address = self._driver.cuMemAlloc(size)
        if error == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return None
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise _failed(f"cuMemAlloc: {getattr(error, 'name', error)}")
        return int(address)


def _rounded(size: int) -> int:
    """Round a size up by at most an eighth, so that requests of similar sizes can share blocks."""
    step = max(_LEAST, 1 << max(0, size.bit_length() - 4))
    return -(-max(size, 1) // step) * step


def _failed(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"CUDA failed at {what}.", "Look at `nvidia-smi`; if the driver is in order, report this message."
    )
