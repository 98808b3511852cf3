"""A GPU that is not there: the driver API that the runtime calls, over NumPy arrays, with its rules.

What is put on the stream runs when the stream is waited for, so whoever does not wait reads too early. New
memory is full of NaNs, freed memory cannot be used. A broken rule that the real API would not report is a
`Fault`.
"""

# ruff: noqa: N801, N802, N803  (the names are those of the real API)

from __future__ import annotations

import bisect
import ctypes
import enum
import itertools
import threading
import types
from importlib.machinery import ModuleSpec

import numpy as np

FIRST = 1 << 56  # of device addresses: none that a process can have
GAP = 1 << 16


class Fault(Exception):  # noqa: N818
    """The real GPU would have gone wrong here, perhaps in silence."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class Gpu:
    """Its memory and its one stream.

    Args:
        sm: 86 is 8.6.
        total: Bytes of memory.
        devices: How many GPUs there are; 0 for none.
    """

    def __init__(self, sm=86, total=1 << 40, devices=1):
        self.sm, self.total, self.devices = sm, total, devices
        self.used = self.peak = 0
        self.launches = self.captures = 0
        self.pinned = {}
        self._memory, self._starts, self._freed = {}, [], set()
        self._next = FIRST
        self._waiting = []  # on the stream
        self.recording = None  # what is captured, while something is
        self._broken = False
        self._graphs, self._handles = {}, itertools.count(1000)
        self._thread = threading.local()

    # memory

    def reserve(self, size):
        """Take memory that is nobody's address, such as that of weights; whether there was so much."""
        if self.used + size > self.total:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def allocate(self, size):
        if not self.reserve(size):
            return None
        address = self._next
        self._next += size + GAP - size % GAP
        self._memory[address] = np.full(size, 0xFF, np.uint8)
        self._starts.append(address)
        return address

    def free(self, address):
        if address in self._freed or address not in self._memory:
            raise Fault(f"{address:#x} is freed, and is not allocated")
        self.used -= self._memory[address].size
        self._memory[address] = None
        self._freed.add(address)

    def view(self, address, size):
        """The bytes at an address, all of one allocation that is not freed."""
        place = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[place] if place >= 0 else 0
        memory = self._memory.get(start)
        if start in self._freed:
            raise Fault(f"{address:#x} was freed, and is used")
        if memory is None or address + size > start + memory.size:
            raise Fault(f"{size} bytes at {address:#x} are not in one allocation")
        return memory[address - start : address - start + size]

    def on_device(self, address):
        return address >= FIRST

    def host(self, address, size):
        """Pinned bytes at an address."""
        for start, memory in self.pinned.items():
            if start <= address and address + size <= start + memory.size:
                return memory[address - start : address - start + size]
        raise Fault(f"{size} bytes at {address:#x} are not pinned")

    # the stream

    def put(self, stream, work):
        """Add work to the stream, or to what is captured of it."""
        if stream != STREAM:
            raise Fault("work goes to another stream")
        (self._waiting if self.recording is None else self.recording).append(work)

    def wait(self):
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            work()

    def forbidden(self):
        """Whether something is called that must not be while the stream is captured."""
        if self.recording is not None:
            self._broken = True
            return True
        return False

    def driver(self):
        """The module `cuda.bindings.driver`."""
        module = types.ModuleType("cuda.bindings.driver")
        module.__spec__ = ModuleSpec(module.__name__, None)
        for kind in (CUresult, CUdevice_attribute, CUstream_flags, CUstreamCaptureMode):
            setattr(module, kind.__name__, kind)
        for name in dir(_Driver):
            if name.startswith("cu"):
                setattr(module, name, getattr(_Driver(self), name))
        return module

    def install(self, monkeypatch):
        """Put it where `import` finds it."""
        parents = [types.ModuleType("cuda"), types.ModuleType("cuda.bindings")]
        for parent in parents:
            parent.__path__ = []
            parent.__spec__ = ModuleSpec(parent.__name__, None, is_package=True)
        driver = self.driver()
        parents[0].bindings, parents[1].driver = parents[1], driver
        for module in (*parents, driver):
            monkeypatch.setitem(__import__("sys").modules, module.__name__, module)


STREAM = 0x5EA
_OK = CUresult.CUDA_SUCCESS


def _needs_context(function):
    """The thread must have said which GPU it uses."""

    def checked(self, *arguments):
        if not getattr(self.gpu._thread, "current", False):
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        return function(self, *arguments)

    checked.__wrapped__ = function
    return checked


def _not_captured(function):
    """What would wait for the GPU cannot be called while its stream is captured."""

    def checked(self, *arguments):
        if self.gpu.forbidden():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        return function(self, *arguments)

    checked.__wrapped__ = function
    return checked


class _Driver:
    """The functions, with the parameters of the real ones."""

    def __init__(self, gpu):
        self.gpu = gpu

    def cuInit(self, Flags):
        return (_OK if self.gpu.devices else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGetCount(self):
        return _OK, self.gpu.devices

    def cuDeviceGet(self, ordinal):
        return _OK, ordinal

    def cuDevicePrimaryCtxRetain(self, dev):
        return _OK, "context"

    def cuCtxSetCurrent(self, ctx):
        self.gpu._thread.current = ctx == "context"
        return (_OK,)

    def cuDeviceGetAttribute(self, attrib, dev):
        known = {
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.gpu.sm // 10,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.gpu.sm % 10,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED: 0,
        }
        return _OK, known[attrib]

    @_needs_context
    def cuStreamCreate(self, Flags):
        return _OK, STREAM

    @_needs_context
    @_not_captured
    def cuStreamDestroy(self, hStream):
        return (_OK,)

    @_needs_context
    @_not_captured
    def cuStreamSynchronize(self, hStream):
        self.gpu.wait()
        return (_OK,)

    @_needs_context
    @_not_captured
    def cuMemAlloc(self, bytesize):
        address = self.gpu.allocate(bytesize) if bytesize else None
        if not bytesize:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None) if address is None else (_OK, address)

    @_needs_context
    @_not_captured
    def cuMemFree(self, dptr):
        self.gpu.free(dptr)
        return (_OK,)

    @_needs_context
    @_not_captured
    def cuMemAllocHost(self, bytesize):
        memory = np.full(bytesize, 0xFF, np.uint8)
        self.gpu.pinned[memory.ctypes.data] = memory
        return _OK, memory.ctypes.data

    @_needs_context
    @_not_captured
    def cuMemFreeHost(self, p):
        del self.gpu.pinned[p]
        return (_OK,)

    @_needs_context
    def cuMemGetInfo(self):
        return _OK, self.gpu.total - self.gpu.used, self.gpu.total

    @_needs_context
    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        def copy():
            self.gpu.view(dstDevice, ByteCount)[:] = self.gpu.host(srcHost, ByteCount)

        self.gpu.put(hStream, copy)
        return (_OK,)

    @_needs_context
    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        def copy():
            self.gpu.host(dstHost, ByteCount)[:] = self.gpu.view(srcDevice, ByteCount)

        self.gpu.put(hStream, copy)
        return (_OK,)

    @_needs_context
    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        def fill():
            self.gpu.view(dstDevice, N)[:] = uc

        self.gpu.put(hStream, fill)
        return (_OK,)

    @_needs_context
    def cuStreamBeginCapture(self, hStream, mode):
        if self.gpu.recording is not None:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.gpu.recording, self.gpu._broken = [], False
        return (_OK,)

    @_needs_context
    def cuStreamEndCapture(self, hStream):
        recorded, self.gpu.recording = self.gpu.recording, None
        if recorded is None or self.gpu._broken:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return _OK, self._kept(recorded)

    @_needs_context
    def cuGraphInstantiate(self, hGraph, flags):
        self.gpu.captures += 1
        return _OK, self._kept(self.gpu._graphs[hGraph])

    @_needs_context
    def cuGraphDestroy(self, hGraph):
        del self.gpu._graphs[hGraph]
        return (_OK,)

    @_needs_context
    def cuGraphLaunch(self, hGraphExec, hStream):
        self.gpu.launches += 1
        for work in self.gpu._graphs[hGraphExec]:
            self.gpu.put(hStream, work)
        return (_OK,)

    @_needs_context
    def cuGraphExecDestroy(self, hGraphExec):
        del self.gpu._graphs[hGraphExec]
        return (_OK,)

    def _kept(self, recorded):
        handle = next(self.gpu._handles)
        self.gpu._graphs[handle] = recorded
        return handle


def read_host(address, count, dtype):
    """Values in host memory, where the real API would read them too."""
    kind = np.ctypeslib.as_ctypes_type(dtype)
    return np.ctypeslib.as_array((kind * count).from_address(address)).copy() if count else np.zeros(0, dtype)


__all__ = ["FIRST", "STREAM", "CUresult", "Fault", "Gpu", "ctypes", "read_host"]
