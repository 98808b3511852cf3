"""Subprocesses that run a module of visprune: start, end with the parent, and a report of how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

__all__ = ["end_with_parent", "start", "status"]

_LINES = 3  # lines of a log that a message quotes


def start(
    module: str, *arguments: str, folder: Path, stdout: int | IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `python -m module`, with a pipe as its stdin.

    Args:
        module: Dotted name of a module of visprune.
        arguments: Arguments of the command line.
        folder: Working directory. It is not the user's own, from which a module could be imported by mistake.
        stdout: Target of stdout, as `subprocess.Popen` takes it.
        stderr: The log file.
    """
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
    )


def status(code: int, log: Path) -> str:
    """Describe how a subprocess ended: by which signal or exit code, and the end of its log.

    Args:
        code: Return code of the subprocess; negative for a signal.
        log: The file that its stderr went to.

    Returns:
        Such as "was ended by SIGKILL. It said last: ..." or "failed with exit code 3."
    """
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = " ".join(" ".join(lines[-_LINES - 1 :]).split()).rstrip(".")
    told = f" It said last: {said}." if said else ""
    if code >= 0:
        return f"failed with exit code {code}.{told}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}.{told}"


def end_with_parent() -> None:
    """Wait until the parent closes stdin or ends, and then end this process.

    Run it in a daemon thread. The parent must write nothing to stdin.
    """
    os.read(0, 1)  # not sys.stdin, whose lock the interpreter needs when it exits
    os._exit(1)
