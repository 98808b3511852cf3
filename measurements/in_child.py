"""Measurement of a script in a subprocess of its own, so that an earlier one cannot affect it.

On Linux, the peak memory of a process includes what its parent had reached when it started the process. So
the measured process is started by this script, a Python that has imported nothing large.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Run", "run"]


@dataclass(frozen=True, slots=True)
class Run:
    """Time, memory and output of a process.

    Attributes:
        seconds: Time from its start to its end.
        peak: Peak resident set in GB, mapped files included.
        said: Text that it wrote to stdout.
        failure: Last line that it wrote to stderr if it failed; else empty.
    """

    seconds: float
    peak: float
    said: str
    failure: str


def run(script: str, *arguments: str, errors: Path) -> Run:
    """Run a script with this Python and measure it; its stderr goes to a file."""
    command = [sys.executable, __file__, str(errors), script, *arguments]
    return Run(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def _measure(errors: Path, *arguments: str) -> Run:
    """Run this Python with arguments, and measure it; called in the small process between."""
    start = time.perf_counter()
    with errors.open("wb") as stderr:
        child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=stderr)
        said = child.stdout.read().decode().strip()
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    failure = (errors.read_text().strip().splitlines() or [f"status {status}"])[-1] if status else ""
    return Run(seconds, usage.ru_maxrss * 1024 / 1e9, said, failure)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(Path(sys.argv[1]), *sys.argv[2:]))))
