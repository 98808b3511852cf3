"""Contestants in processes of their own, driven in turn over pipes; see `contestant.py`.

Memory is each one's own that way, and a round is one repetition of each while the others wait, so that what
else the machine does hits all alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from measure import Memory, Middle

__all__ = ["METRICS", "WARM_UP", "Contestant", "ContestantError", "times"]

METRICS = ("first token", "vision", "prune", "embed", "prefill", "decode")
WARM_UP = 2


class ContestantError(Exception):
    """A contestant has ended; says why."""


class Contestant:
    """A process that holds one model, and what it has said.

    Args:
        name: For tables.
        arguments: Of `contestant.py`.
        errors: The file that it writes stderr to.

    Raises:
        ContestantError: It could not load its model.
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
        """One repetition; its times are kept if it counts.

        Raises:
            ContestantError: The process has ended.
        """
        reply = self._ask("")
        for metric in METRICS if counts else ():
            self.ms[metric].append(reply["ms"].get(metric, 0.0))

    def answer(self) -> tuple[list[float], list[int]]:
        """One repetition that does not count: logits of the first new token, and all new tokens.

        Raises:
            ContestantError: The process has ended.
        """
        reply = self._ask("answer")
        return reply["logits"], reply["tokens"]

    def close(self) -> None:
        """End the process, as the end of its pipe does."""
        self._process.communicate()

    def _ask(self, text: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the reply says why
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
    def middles(self) -> dict[str, Middle]:
        """Of the times, in milliseconds."""
        return {metric: Middle.of(values) for metric, values in self.ms.items()}


def times(contestants: list[Contestant]) -> None:
    """Print a table of the medians."""
    width = max(len(contestant.name) for contestant in contestants)
    print(f"{'ms':{width}s}" + "".join(f"{metric:>18s}" for metric in METRICS))
    for contestant in contestants:
        middles = contestant.middles
        cells = [f"{middles[m].median:10.1f} ({100 * middles[m].spread:3.0f}%)" for m in METRICS]
        print(f"{contestant.name:{width}s}" + "".join(f"{cell:>18s}" for cell in cells))
