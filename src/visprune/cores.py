"""Processor cores and memory that this process may use, read from Linux's own files.

The runtime sets threads and refuses models that are too large by these numbers, so this module starts no
other program. `visprune.machine` describes the machine itself: its GPU, CUDA, total memory, and Jetson.
"""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path

__all__ = [
    "available_memory",
    "processor_flags",
    "processor_name",
    "sums_may_overflow",
    "total_memory",
    "usable_cores",
]

_CPUS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_QUOTA = _CGROUPS / "cpu.max"
_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of physical cores within the affinity mask and the container's quota; at least 1.

    Two hardware threads of one core share its arithmetic units, which matrix products keep busy, so they
    count once.
    """
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in logical})
    with suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = _QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _siblings(cpu: int) -> str:
    with suppress(OSError):
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(cpu)


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int | None:
    """Return the bytes of memory that are available without swapping; None if the system does not say.

    They are at most what the limit of a container or of a service leaves.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return min([free, *_left_of_limits()])


def _left_of_limits() -> list[int]:
    """Return what each limit of memory leaves that this process is under (control groups, version 2)."""
    found = []
    with suppress(OSError, ValueError):
        path = next((line[3:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::")), "")
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):
            group = _CGROUPS.joinpath(*parts[:depth])
            with suppress(OSError, ValueError):  # "max" where there is no limit
                most = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append(max(0, most - used + int(stat.get("inactive_file", 0))))  # files can be dropped
    return found


def sums_may_overflow() -> bool:
    """Return whether the processor adds up products of bytes in 16 bits, as x86 without VNNI does.

    False if the system does not say.
    """
    flags = _cpuinfo().get("flags")  # of x86 only
    return flags is not None and "vnni" not in flags


def processor_name() -> str:
    """Return the name of the processor, or of its architecture if the system does not say the name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> tuple[str, ...]:
    """Return the instruction set extensions of the processor, such as "avx2"; empty if they are not known."""
    found = _cpuinfo()
    return tuple((found.get("flags") or found.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    """Return the fields that Linux tells of the first processor; an empty dictionary on other systems."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
