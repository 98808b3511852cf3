"""The side of the command that measures, of the processes in `worker.py`."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from visprune import errors
from visprune.bench.measure.protocol import Contender, Done, Loaded
from visprune.bench.report.report import Workload
from visprune.errors import UnsupportedError, VispruneError
from visprune.records import from_json
from visprune.subprocesses import start, status

__all__ = ["Worker"]


class Worker:
    """One process with one model. Use it in a `with`, which ends the process.

    Args:
        contender: What it runs.
        folder: An empty directory, for what the process prints.
    """

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        self._said = folder / "stderr.txt"
        with self._said.open("wb") as said:
            self._process = start(
                "visprune.bench.measure.worker", folder=folder, stdout=subprocess.PIPE, stderr=said
            )
        self._requests, self._replies = (
            cast("IO[bytes]", self._process.stdin),
            cast("IO[bytes]", self._process.stdout),
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def load(self, work: Workload) -> Loaded:
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
        hint = "Report this, with the whole message." if code >= 0 else "Run it again."
        if -code == signal.SIGKILL:
            hint = "The machine may have too little memory: compare fewer at once, each has its own weights."
        return UnsupportedError(f"The process of {self.contender.name} {status(code, self._said)}", hint)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
