"""Counters of energy: RAPL for processors, NVML for GPUs, tegrastats for Jetsons.

Each counts joules of a whole processor, GPU or board, not of a process: the energy of other processes and of
idle times is included. Only the difference of two readings has a meaning.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from visprune.bench.measure.gpu import NvmlGpu

__all__ = ["Counter", "NoCounter", "Rapl", "Tegrastats", "counter", "watts"]

_POWERCAP = Path("/sys/class/powercap")
_TEGRASTATS_MS = 50

# Power now and its average: 'VDD_IN 4874mW/4874mW', and on old boards 'POM_5V_IN 1522/1522', in mW too.
_RAIL = re.compile(r"\b((?:VDD|VIN|POM)_\w+) (\d+)(?:mW)?/\d+")
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")  # the other rails are parts of these


class Counter(Protocol):
    """A counter of energy.

    Attributes:
        about: Name of the counter and what it covers, or why there is none.
    """

    about: str

    def joules(self) -> float | None:
        """Return the energy used since a fixed moment; None if it is not known."""


class NoCounter:
    """The absence of a counter.

    Args:
        about: Why there is none.
    """

    def __init__(self, about: str) -> None:
        self.about = about

    def joules(self) -> float | None:
        """Return None."""
        return None


class Rapl:
    """The counters of Intel and AMD processors, read from Linux's powercap: all packages, without memory.

    Args:
        zones: Directories of the packages in powercap.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.about = f"RAPL, {len(zones)} processor package{'s' if len(zones) > 1 else ''}"
        self._zones = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._total = 0

    def joules(self) -> float | None:
        """Return the energy used since this object was made.

        A counter smaller than at the last call has overflowed; it is taken to have done so once.
        """
        for zone, most in self._zones.items():
            now = _number(zone / "energy_uj")
            step = now - self._last[zone]
            self._total += step if step >= 0 else step + most
            self._last[zone] = now
        return self._total / 1e6


class Tegrastats:
    """The energy of a Jetson: the power that `tegrastats` prints every 50 ms, summed over time in a thread.

    Args:
        lines: The output of tegrastats.
    """

    about = f"tegrastats every {_TEGRASTATS_MS} ms, the module"

    def __init__(self, lines: IO[str]) -> None:
        self._joules = 0.0
        threading.Thread(target=self._add_up, args=(lines,), daemon=True).start()

    def _add_up(self, lines: IO[str]) -> None:
        last = time.perf_counter()
        for line in lines:
            now = time.perf_counter()
            self._joules += watts(line) * (now - last)
            last = now

    def joules(self) -> float | None:
        """Return the energy used since this object was made."""
        return self._joules


def watts(line: str) -> float:
    """Return the watts in a line of tegrastats: those of the whole board, or else the sum of its rails."""
    rails = {name: int(value) / 1e3 for name, value in _RAIL.findall(line)}
    whole = [rails[name] for name in _WHOLE_BOARD if name in rails]
    return whole[0] if whole else sum(rails.values())


@contextmanager
def counter(gpu: NvmlGpu | None, powercap: Path = _POWERCAP) -> Iterator[Counter]:
    """Yield the counter of energy of this machine.

    Args:
        gpu: The GPU that computes; None if the CPU does.
        powercap: Directory of the processor's counters in Linux.
    """
    if gpu is not None and gpu.joules() is not None:
        yield _Nvml(gpu)
        return
    if shutil.which("tegrastats"):
        command = ["tegrastats", "--interval", str(_TEGRASTATS_MS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield Tegrastats(process.stdout) if process.stdout else NoCounter("no counter")
            finally:
                process.kill()
        return
    if gpu is not None:
        yield NoCounter(f"no counter: {gpu.why_no_energy}")
        return
    zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
    zones = [zone for zone in zones if _name(zone).startswith("package")]
    if not zones:
        yield NoCounter("no counter: neither RAPL, NVML nor tegrastats")
    elif not all(os.access(zone / "energy_uj", os.R_OK) for zone in zones):
        yield NoCounter("no counter: only root may read RAPL")
    else:
        yield Rapl(zones)


class _Nvml:
    def __init__(self, gpu: NvmlGpu) -> None:
        self.about = f"NVML, {gpu.name or 'the GPU'}"
        self._gpu = gpu

    def joules(self) -> float | None:
        return self._gpu.joules()


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except OSError:
        return ""
