"""Build each engine in a subprocess, so that a crash or leaked memory cannot affect the parent.

`build_in_subprocess` runs in the parent, `main` in the subprocess, which is started as

    python -m visprune.engines.build_process FOLDER

It reads request.json in FOLDER and writes the engine; if that fails, it writes outcome.json with the error.
The subprocess ends when its parent ends, because that closes its stdin.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from visprune import errors
from visprune.engines.builder import Request, build_engine
from visprune.errors import EngineError, VispruneError
from visprune.records import from_json
from visprune.subprocesses import end_with_parent, start, status

__all__ = ["build_in_subprocess", "main"]

_REQUEST, _OUTCOME, _LOG = "request.json", "outcome.json", "stderr.txt"
_POLL = 0.1  # seconds between two readings of the subprocess's memory


def build_in_subprocess(request: Request, folder: Path, most: int | None = None) -> None:
    """Build one engine in a subprocess.

    Args:
        request: The engine to build, with absolute paths.
        folder: An empty directory for the files that both processes exchange.
        most: Bytes of memory that the subprocess may hold; None: limited only by the memory of the machine.

    Raises:
        EngineError: The subprocess failed, crashed, was killed, or held more memory than it may.
    """
    (folder / _REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
    with (folder / _LOG).open("wb") as log:
        process = start("visprune.engines.build_process", ".", folder=folder, stdout=log, stderr=log)
        try:
            code = _wait(process, request, most)
        finally:
            process.kill()
            process.communicate()
    with suppress(OSError, ValueError):  # there is no outcome, or only half of one because the disk was full
        found = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
        raise getattr(errors, found["kind"])(found["what"], found["hint"])
    if code != 0:
        raise _failure(request, code, folder / _LOG)


def _wait(process: subprocess.Popen[bytes], request: Request, most: int | None) -> int:
    """Wait for a process, and return its exit code. If its memory is capped, poll that meanwhile."""
    while True:
        try:
            return process.wait(None if most is None else _POLL)
        except subprocess.TimeoutExpired:
            used = _resident(process.pid)
            if most is not None and used > most:
                raise EngineError(
                    f"Building {request.graph} for SM{request.sm} took {used / 1e9:.2f} GB of memory, and "
                    f"{most / 1e9:.2f} GB are allowed.",
                    "Give a larger --max-memory or none, or export with --segments for smaller graphs.",
                ) from None


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process holds; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s*(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def _failure(request: Request, code: int, log: Path) -> EngineError:
    """Return the error for a subprocess that ended without an outcome."""
    hint = "Report this, with the whole message."
    if code < 0:
        hint = "Run it again; engines that are finished will be taken from the cache."
    if -code == signal.SIGKILL:
        hint = f"The machine may have too little memory: close other programs. {hint}"
    return EngineError(f"Building {request.graph} for SM{request.sm} {status(code, log)}", hint)


def main(folder: Path) -> int:
    """Build the engine that request.json in a directory describes, and return the exit code."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    request = from_json(Request, json.loads((folder / _REQUEST).read_text(encoding="utf-8")), _REQUEST)
    try:
        build_engine(request)
    except VispruneError as error:
        outcome = {"kind": type(error).__name__, "what": error.what, "hint": error.hint}
        (folder / _OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
