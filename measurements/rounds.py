"""Rounds of contestants: each holds its model in a subprocess and repeats on demand; see `contestant.py`.

Memory can be told apart this way. A round is one repetition of each contestant while the others wait, so that
other load on the machine affects all alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from measure import Memory, Summary

__all__ = ["METRICS", "WARM_UP", "Contestant", "ContestantError", "times"]

METRICS = ("first token", "vision", "prune", "embed", "prefill", "decode")
WARM_UP = 2  # rounds


class ContestantError(Exception):
    """A contestant has ended; the text says why."""


class Contestant:
    """A subprocess that holds one model, and the times and memory that it reported.

    Args:
        name: Name in tables.
        arguments: Arguments of `contestant.py`.
        errors: File for its stderr.

    Raises:
        ContestantError: The subprocess could not load its model.
    """

    def __init__(self, name: str, arguments: list[str], errors: Path) -> None:
        self.name = name
        self._errors = errors
        script = Path(__file__).with_name("contestant.py")
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.loaded = self.memory = Memory(**self._reply()["memory"])
        self.ms: dict[str, list[float]] = {metric: [] for metric in METRICS}

    def repeat(self, *, counts: bool) -> None:
        """Run one repetition, and keep its times if it counts.

        Raises:
            ContestantError: The subprocess has ended.
        """
        reply = self._ask("")
        for metric in METRICS if counts else ():
            self.ms[metric].append(reply["ms"].get(metric, 0.0))

    def answer(self) -> tuple[list[float], list[int]]:
        """Run one repetition that does not count; return the first new token's logits, and all new tokens.

        Raises:
            ContestantError: The subprocess has ended.
        """
        reply = self._ask("answer")
        return reply["logits"], reply["tokens"]

    def close(self) -> None:
        """Close the pipe, which ends the subprocess."""
        self._process.communicate()

    def _ask(self, text: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `_reply` finds out why
            print(text, file=self._process.stdin, flush=True)
        reply = self._reply()
        self.memory = Memory(**reply["memory"])
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        status = self._process.wait()
        said = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ContestantError(f"{self.name} failed: {said[-1] if said else f'status {status}'}")

    @property
    def summaries(self) -> dict[str, Summary]:
        """Summary of the times of each stage, in milliseconds."""
        return {metric: Summary.of(values) for metric, values in self.ms.items()}


def times(contestants: list[Contestant]) -> None:
    """Print a table of the medians."""
    width = max(len(contestant.name) for contestant in contestants)
    print(f"{'ms':{width}s}" + "".join(f"{metric:>18s}" for metric in METRICS))
    for contestant in contestants:
        found = contestant.summaries
        cells = [f"{found[m].median:10.1f} ({100 * found[m].spread:3.0f}%)" for m in METRICS]
        print(f"{contestant.name:{width}s}" + "".join(f"{cell:>18s}" for cell in cells))
