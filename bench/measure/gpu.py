"""GPU memory of a process and energy of the GPU, as NVIDIA's driver counts them.

The driver is asked through its library NVML, by the package nvidia-ml-py (module pynvml), which the extras of
GPU backends bring. Only the first GPU is asked: a process uses that one if `CUDA_VISIBLE_DEVICES` is not set.
This has not been run on a GPU. A Jetson's driver has no NVML before JetPack 7.
"""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import Any

from visprune.errors import MissingExtraError
from visprune.optional import require

__all__ = ["NvmlGpu"]


class NvmlGpu:
    """The first GPU of the machine. Make it with `find`.

    Args:
        nvml: The module pynvml, initialised. None if it is not installed; then nothing is known of the GPU.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: ModuleType | None, handle: Any = None) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def find(cls) -> NvmlGpu | None:
        """Return the first GPU; None if there is no driver or no GPU."""
        try:
            nvml = require("pynvml", extra="gpu")
        except MissingExtraError:
            return cls(None)
        with suppress(nvml.NVMLError):
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        return None

    @property
    def name(self) -> str | None:
        """Name that the driver gives it, such as 'NVIDIA GeForce RTX 4090'; None if it is not known."""
        name = self._ask("nvmlDeviceGetName")
        return None if name is None else str(name)

    @property
    def why_no_energy(self) -> str:
        """Reason why `joules` returns None, if it does."""
        return "this GPU has none" if self._nvml else "the package nvidia-ml-py is not installed"

    def joules(self) -> float | None:
        """Return the energy used since the driver was loaded, by the whole GPU; None if it is not counted."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else int(millijoules) / 1e3

    def process_bytes(self, pid: int) -> int | None:
        """Return the GPU memory of a process; None if the driver does not know it, as in containers."""
        # The name without a version raises an error that is no NVMLError where the driver is older.
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses_v3") or []
        return next((one.usedGpuMemory for one in processes if one.pid == pid), None)

    def _ask(self, function: str) -> Any:
        """Call a function of NVML for this GPU; return None if there is no NVML or it reports an error."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle)
        except (AttributeError, self._nvml.NVMLError):  # another package is named pynvml too
            return None
