"""What NVIDIA's driver counts, asked of its library NVML without a package: memory of a process, and energy.

Only the GPU that a process without `CUDA_VISIBLE_DEVICES` takes, the first one, is looked at. Never run here
on a GPU, and not on a Jetson, whose driver has no NVML before JetPack 7.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["Gpu"]

_MOST_PROCESSES = 256
_UNKNOWN = 2**64 - 1  # what NVML says of memory that it does not know


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t` of version 2 and later."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Gpu:
    """The first GPU. Make it with `find`."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def find(cls) -> Gpu | None:
        """The first GPU; None where there is no driver or no GPU."""
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.c_void_p()
            if library.nvmlInit_v2() == 0 and (
                library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
            ):
                return cls(library, handle)
        return None

    @property
    def name(self) -> str:
        """As the driver calls it."""
        text = ctypes.create_string_buffer(96)
        done = self._library.nvmlDeviceGetName(self._handle, text, len(text))
        return text.value.decode("utf-8", "replace") if done == 0 else "NVIDIA GPU"

    def joules(self) -> float | None:
        """Used since the driver was loaded, by the whole GPU; None where it does not count."""
        millijoules = ctypes.c_ulonglong()
        with suppress(AttributeError):
            call = self._library.nvmlDeviceGetTotalEnergyConsumption
            if call(self._handle, ctypes.byref(millijoules)) == 0:
                return millijoules.value / 1e3
        return None

    def process_bytes(self, pid: int) -> int | None:
        """Memory of the GPU that a process has; None where the driver does not see it, as in containers."""
        processes = (_Process * _MOST_PROCESSES)()
        count = ctypes.c_uint(_MOST_PROCESSES)
        with suppress(AttributeError):
            call = self._library.nvmlDeviceGetComputeRunningProcesses_v3
            if call(self._handle, ctypes.byref(count), processes) == 0:
                known = {one.pid: int(one.used) for one in processes[: count.value] if one.used != _UNKNOWN}
                return known.get(pid)
        return None
