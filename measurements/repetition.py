"""What a contestant does for each request: one prefill and some greedy tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Contender", "Repeat", "Repetition", "elapsed"]


@dataclass(slots=True)
class Repetition:
    """Result of a prefill and greedy decoding.

    Attributes:
        logits: Logits of the first new token, [V]; None if the contestant does not give them.
        tokens: All new tokens.
        ms: Milliseconds to the first token, of each stage until then, and of each later token ("decode").
    """

    logits: Any
    tokens: list[int]
    ms: dict[str, float]


Repeat = Callable[[], Repetition]


@dataclass(frozen=True, slots=True)
class Contender:
    """A loaded model.

    Attributes:
        repeat: Runs one repetition.
        process: Id of the process that holds the model, as in /proc.
        close: Ends that process.
    """

    repeat: Repeat
    process: str = "self"
    close: Callable[[], object] = lambda: None


def elapsed(start: float) -> float:
    """Return the milliseconds since a reading of the clock."""
    return (time.perf_counter() - start) * 1e3
