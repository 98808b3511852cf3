"""Energy, where something counts it.

Each counter gives joules since some moment, of a whole processor, GPU or board and not of a process: what
else runs there is in it, and so is what they use while they wait.
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

from visprune.bench.measure.gpu import Gpu

__all__ = ["Counter", "NoCounter", "Rapl", "Tegrastats", "counter", "watts"]

_POWERCAP = Path("/sys/class/powercap")
_TEGRASTATS_MS = 50

# 'VDD_IN 4874mW/4874mW', and on old boards 'POM_5V_IN 1522/1522': now, and the average.
_RAIL = re.compile(r"\b((?:VDD|VIN|POM)_\w+) (\d+)(?:mW)?/\d+")
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")  # the others are parts of it


class Counter(Protocol):
    """Something that counts energy."""

    about: str

    def joules(self) -> float | None:
        """Since some moment."""


class NoCounter:
    """Where nothing does.

    Args:
        about: Why.
    """

    def __init__(self, about: str) -> None:
        self.about = about

    def joules(self) -> float | None:
        """Not known."""
        return None


class Rapl:
    """The counters of Intel and AMD processors, through Linux's powercap: all packages, without memory.

    Args:
        zones: Directories of the packages.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.about = f"RAPL, {len(zones)} processor package{'s' if len(zones) > 1 else ''}"
        self._zones = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._total = 0

    def joules(self) -> float | None:
        """Since this was made; a counter that has begun anew has done so once."""
        for zone, most in self._zones.items():
            now = _number(zone / "energy_uj")
            step = now - self._last[zone]
            self._total += step if step >= 0 else step + most
            self._last[zone] = now
        return self._total / 1e6


class Tegrastats:
    """A Jetson's power, added up from what `tegrastats` prints every 50 ms.

    Args:
        lines: What it prints.
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
        """Since this was made."""
        return self._joules


def watts(line: str) -> float:
    """The power that a line of tegrastats tells: of the whole board, or else of all its rails."""
    rails = {name: int(value) / 1e3 for name, value in _RAIL.findall(line)}
    whole = [rails[name] for name in _WHOLE_BOARD if name in rails]
    return whole[0] if whole else sum(rails.values())


@contextmanager
def counter(gpu: Gpu | None, powercap: Path = _POWERCAP) -> Iterator[Counter]:
    """What counts energy here.

    Args:
        gpu: The GPU that computes; None on the CPU.
        powercap: Where Linux has the processor's counters.
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
        yield NoCounter("no counter: this GPU has none")
        return
    zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
    zones = [zone for zone in zones if _name(zone).startswith("package")]
    if not zones:
        yield NoCounter("no counter: neither RAPL, NVML nor tegrastats")
    elif not all(os.access(zone / "energy_uj", os.R_OK) for zone in zones):
        yield NoCounter("no counter: RAPL is there, and only root may read it")
    else:
        yield Rapl(zones)


class _Nvml:
    def __init__(self, gpu: Gpu) -> None:
        self.about = f"NVML, {gpu.name}"
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
