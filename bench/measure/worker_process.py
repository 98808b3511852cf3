"""The side of the command that measures, of the processes in `worker.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import visprune
from visprune import errors
from visprune.bench.measure.worker import Contender, Done, Loaded
from visprune.bench.report.report import Work
from visprune.errors import UnsupportedError, VispruneError
from visprune.records import from_json

__all__ = ["Worker"]

_LINES = 3  # of what it said last


class Worker:
    """One process with one model. Use it in a `with`, which ends the process.

    Args:
        contender: What it runs.
        folder: An empty directory, for what the process prints.
    """

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        self._said = folder / "stderr.txt"
        paths = [str(Path(visprune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "visprune.bench.measure.worker"],
                cwd=folder,  # nothing where the user stands is imported by mistake
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        self._requests, self._replies = (
            cast("IO[bytes]", self._process.stdin),
            cast("IO[bytes]", self._process.stdout),
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def load(self, work: Work) -> Loaded:
        """Load the model.

        Raises:
            VispruneError: It cannot be loaded, or the process was ended.
        """
        return from_json(
            Loaded, self._ask({"contender": asdict(self.contender), "work": asdict(work)}), "worker"
        )

    def repeat(self) -> Done:
        """Run the work once.

        Raises:
            VispruneError: The prompt cannot be taken, or the process was ended.
        """
        return from_json(Done, self._ask({"do": "repeat"}), "worker")

    def pictures(self) -> tuple[str, ...]:
        """The overlays of the last repetition, one an image, JPEG in base64."""
        return tuple(self._ask({"do": "pictures"}))

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            self._requests.write(json.dumps(request).encode("utf-8") + b"\n")
            self._requests.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._died()
        reply = json.loads(line)
        if isinstance(reply, dict) and "error" in reply:
            found = reply["error"]
            kind: type[VispruneError] = getattr(errors, found["kind"])
            raise kind(f"{self.contender.name}: {found['what']}", found["hint"])
        return reply

    def _died(self) -> UnsupportedError:
        code = self._process.wait()
        lines = self._said.read_text(encoding="utf-8", errors="replace").split("\n")
        said = " ".join(" ".join(lines[-_LINES - 1 :]).split()).rstrip(".")
        told = f" It said last: {said}." if said else ""
        if code >= 0:
            return UnsupportedError(
                f"The process of {self.contender.name} ended with exit code {code}.{told}",
                "Report this, with the whole message.",
            )
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "Run it again."
        if -code == signal.SIGKILL:
            hint = "The machine may have too little memory: compare fewer at once, each has its own weights."
        return UnsupportedError(f"The process of {self.contender.name} was ended by {name}.{told}", hint)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
