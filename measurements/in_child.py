"""A process of its own for each thing that is measured, so that nothing is left over from the one before.

Linux counts as a process's peak also what the process that started it had reached. So a measured one is
started from here, by a Python that has imported nothing large.
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
    """What a process took.

    Attributes:
        seconds: From its start to its end.
        peak: Its peak resident set in GB, mapped files included.
        said: What it wrote to stdout.
        failure: The last line it wrote to stderr where it failed.
    """

    seconds: float
    peak: float
    said: str
    failure: str


def run(script: str, *arguments: str, errors: Path) -> Run:
    """Run a script with this Python; what it writes to stderr goes to a file."""
    command = [sys.executable, __file__, str(errors), script, *arguments]
    return Run(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def _measure(errors: Path, *arguments: str) -> Run:
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
