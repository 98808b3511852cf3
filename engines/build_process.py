"""A process for each engine: what TensorRT takes or breaks there, the command that builds keeps.

`build_in_child` is the side of the command, `main` that of the process:

    python -m visprune.engines.build_process FOLDER

reads request.json, writes the engine, and outcome.json with what went wrong. The process ends with its
parent, whose end it sees at stdin.
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

__all__ = ["build_in_child", "main"]

_REQUEST, _OUTCOME, _SAID = "request.json", "outcome.json", "stderr.txt"
_LOOK = 0.1  # seconds between looks at the memory of the process


def build_in_child(request: Request, folder: Path, most: int | None = None) -> None:
    """Build one engine in a process of its own.

    Args:
        request: With absolute paths.
        folder: Empty, for what the two processes tell each other.
        most: Bytes of memory that the process may hold; None: as much as there is.

    Raises:
        EngineError: The process failed, crashed, was killed, or held more memory than it may.
    """
    (folder / _REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
    with (folder / _SAID).open("wb") as said:
        process = start("visprune.engines.build_process", ".", folder=folder, stdout=said, stderr=said)
        try:
            code = _wait(process, request, most)
        finally:
            process.kill()
            process.communicate()
    with suppress(OSError, ValueError):  # it wrote none, or had no room for it
        found = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
        raise getattr(errors, found["kind"])(found["what"], found["hint"])
    if code != 0:
        raise _died(request, code, folder / _SAID)


def _wait(process: subprocess.Popen[bytes], request: Request, most: int | None) -> int:
    """The exit code; while it runs its memory is watched, if that is capped."""
    while True:
        try:
            return process.wait(None if most is None else _LOOK)
        except subprocess.TimeoutExpired:
            used = _resident(process.pid)
            if most is not None and used > most:
                raise EngineError(
                    f"Building {request.graph} for SM{request.sm} took {used / 1e9:.2f} GB of memory, and "
                    f"{most / 1e9:.2f} GB are allowed.",
                    "Give a larger --max-memory or none, or export with --segments for smaller graphs.",
                ) from None


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it has ended."""
    try:
        told = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s*(\d+) kB", told)
    return 1024 * int(found[1]) if found else 0


def _died(request: Request, code: int, log: Path) -> EngineError:
    hint = "Report this, with the whole message."
    if code < 0:
        hint = "Run it again; engines that were finished are taken from the cache."
    if -code == signal.SIGKILL:
        hint = f"The machine may have too little memory: close other programs. {hint}"
    return EngineError(f"Building {request.graph} for SM{request.sm} {status(code, log)}", hint)


def main(folder: Path) -> int:
    """Build what request.json asks for."""
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
