"""Description of this machine: its GPU, CUDA and memory, and the kind of Jetson if it is one.

The facts come from the driver, the system's own tools and its files, whichever are there; no package is
needed. Nothing here raises an error: a fact that cannot be found is None. `visprune.cores` has the cores and
memory that this process may use.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["HERE", "Gpu", "Jetson", "System", "cuda", "gpu", "jetson", "memory", "package", "power_mode"]

_CHIPS = {"nvidia,tegra234": ("Orin", 87), "nvidia,tegra264": ("Thor", 110)}
_JETPACKS = {"36": "6", "38": "7", "39": "7"}  # major version of JetPack, by the first number of L4T
_QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU.

    Attributes:
        name: Name of the GPU.
        sm: Compute capability times ten, such as 87.
        memory: Bytes of its memory; of the machine's memory if they share it. None if not known.
        driver: Version of the driver, such as "570.86.15"; None if not known.
        answers: Whether the driver or nvidia-smi reported the GPU. False for a Jetson's GPU that is known
            only by its chip.
    """

    name: str
    sm: int
    memory: int | None = None
    driver: str | None = None
    answers: bool = True


@dataclass(frozen=True, slots=True)
class Jetson:
    """Model and software of a Jetson.

    Attributes:
        model: Model in the device tree.
        l4t: Version of Jetson Linux, such as "36.4.3"; None if not known, as in a container.
        jetpack: Version of the package nvidia-jetpack, such as "6.2+b77". If it is not installed, the major
            version that `l4t` belongs to; None if that is not known either.
    """

    model: str
    l4t: str | None
    jetpack: str | None


def _output(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _asked_of_driver() -> Gpu | None:
    """Ask the driver through cuda-bindings; no context is made on the GPU."""
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
        attribute = driver.CUdevice_attribute
        _checked(driver.cuInit(0))
        device = _checked(driver.cuDeviceGet(0))
        name = _checked(driver.cuDeviceGetName(128, device))
        major, minor = (
            int(_checked(driver.cuDeviceGetAttribute(which, device)))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        total = int(_checked(driver.cuDeviceTotalMem(device)))
    except Exception:  # no package, no GPU, or no driver, for which each version raises another exception
        return None
    return Gpu(name.decode().rstrip("\0"), 10 * major + minor, total)


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    if int(error):
        raise RuntimeError(str(error))
    return values[0] if values else None


@dataclass(frozen=True, slots=True)
class System:
    """Sources of facts about a machine; tests give those of other machines.

    Attributes:
        root: Root of the file system.
        run: Returns the output of a command; None if the command is missing or fails.
        driver: Asks the driver for the GPU.
    """

    root: Path = Path("/")
    run: Callable[[tuple[str, ...]], str | None] = _output
    driver: Callable[[], Gpu | None] = _asked_of_driver

    def text(self, path: str) -> str:
        """Return the text of a file; an empty text if it cannot be read."""
        with suppress(OSError):
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        return ""


HERE = System()
"""This machine."""


def gpu(system: System = HERE) -> Gpu | None:
    """Find the first NVIDIA GPU by the driver, nvidia-smi, or the chip of a Jetson; None if there is none."""
    found = system.driver() or _smi(system) or _chip(system)
    if found is None:
        return None
    if found.driver is None:
        version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", system.text("proc/driver/nvidia/version"))
        found = replace(found, driver=version.group() if version else None)
    return found


def _smi(system: System) -> Gpu | None:
    """Read the first line of nvidia-smi; None if it has only a name, as on some Jetsons."""
    lines = (system.run((*_QUERY, "--format=csv,noheader,nounits")) or "").splitlines()
    fields = [field.strip() for field in lines[0].split(",")] if lines else []
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d", fields[1]):
        return None
    name, capability, mebibytes, driver = fields
    shared = memory(system) if jetson(system) else None
    return Gpu(
        name,
        int(capability.replace(".", "")),
        int(mebibytes) << 20 if mebibytes.isdecimal() else shared,
        driver if driver[:1].isdigit() else None,
    )


def _chip(system: System) -> Gpu | None:
    """Return the GPU of a Jetson by the chip in its device tree; None if it is no known chip."""
    for compatible in system.text("proc/device-tree/compatible").split("\0"):
        if compatible in _CHIPS:
            name, sm = _CHIPS[compatible]
            return Gpu(name, sm, memory(system), answers=False)
    return None


def jetson(system: System = HERE) -> Jetson | None:
    """Return the model and software of this Jetson; None if the machine is no Jetson."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", system.text("etc/nv_tegra_release"))
    if release is None and _chip(system) is None:
        return None
    model = system.text("proc/device-tree/model").rstrip("\0\n") or "unknown"
    l4t = f"{release[1]}.{release[2]}" if release else None
    return Jetson(
        model, l4t, package("nvidia-jetpack", system) or (_JETPACKS.get(release[1]) if release else None)
    )


def package(name: str, system: System = HERE) -> str | None:
    """Return the version of a system package (Debian, Ubuntu); None if it is not installed."""
    told = system.run(("dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", name)) or ""
    state, _, version = told.partition(" ")
    return version if state == "installed" else None


def power_mode(system: System = HERE) -> str | None:
    """Return the power mode of a Jetson, such as "MAXN" or "15W"; None if it is not known."""
    told = re.search(r"NV Power Mode: *(\S+)", system.run(("nvpmodel", "-q")) or "")
    return told[1] if told else None


def cuda(system: System = HERE) -> str | None:
    """Return the CUDA version of the driver, else of the system's toolkit; None if neither is found."""
    told = re.search(r"CUDA Version: *(\d+\.\d+)", system.run(("nvidia-smi",)) or "")
    toolkit = re.search(
        r'"cuda" *: *{[^}]*"version" *: *"([\d.]+)"', system.text("usr/local/cuda/version.json")
    )
    found = told or toolkit
    return found[1] if found else None


def memory(system: System = HERE) -> int | None:
    """Return the bytes of memory of the machine; None if they are not known."""
    told = re.search(r"MemTotal: *(\d+) kB", system.text("proc/meminfo"))
    return 1024 * int(told[1]) if told else None
