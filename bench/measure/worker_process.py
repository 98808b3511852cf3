"""The measuring command's handle of a worker process; the process itself is in `worker.py`."""

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
    """One worker process with one model. Use it in a `with`, which ends the process.

    Args:
        contender: The model that it runs.
        folder: An empty directory, for the log of the process.
    """

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        self._log = folder / "stderr.txt"
        with self._log.open("wb") as log:
            self._process = start(
                "visprune.bench.measure.worker", folder=folder, stdout=subprocess.PIPE, stderr=log
            )
        self._requests, self._replies = (
            cast("IO[bytes]", self._process.stdin),
            cast("IO[bytes]", self._process.stdout),
        )

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def load(self, work: Workload) -> Loaded:
        """Load the model.

        Raises:
            VispruneError: The model cannot be loaded, or the process was ended.
        """
        return from_json(
            Loaded, self._ask({"contender": asdict(self.contender), "work": asdict(work)}), "worker"
        )

    def repeat(self) -> Done:
        """Run the work once.

        Raises:
            VispruneError: The model cannot run this prompt, or the process was ended.
        """
        return from_json(Done, self._ask({"do": "repeat"}), "worker")

    def overlays(self) -> tuple[str, ...]:
        """Return the overlay of each image in the last repetition, JPEG in base64."""
        return tuple(self._ask({"do": "overlays"}))

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
            hint = (
                "The machine may have too little memory: compare fewer bundles at once, because each process "
                "has its own weights."
            )
        return UnsupportedError(f"The process of {self.contender.name} {status(code, self._log)}", hint)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
