"""What the measuring command and its workers tell each other, and how a worker measures itself.

A worker is asked for one of three things, as a line of JSON; see `worker`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from visprune.bench.report.report import Repetition, Role

__all__ = ["Contender", "Done", "Loaded", "Repeatable", "elapsed", "peak_memory"]


@dataclass(frozen=True, slots=True)
class Contender:
    """What one row runs.

    Attributes:
        name: Of the row.
        role: Why it is there.
        path: Directory of a bundle, or of a checkpoint for PyTorch.
        keep_tokens: Visual tokens kept of one tile; what the bundle was exported for if neither is given.
        ratio: The same as a fraction.
        dtype: In PyTorch; None is a bundle.
        chat_template: In PyTorch, a file that takes the place of the checkpoint's own.
    """

    name: str
    role: Role
    path: str
    keep_tokens: int | None = None
    ratio: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is there, after so many milliseconds."""

    load: float


@dataclass(frozen=True, slots=True)
class Done:
    """One repetition, with what it worked on.

    Attributes:
        repetition: Its times.
        visual_tokens: Of the prompt, before any pruning.
        layer_tokens: Tokens of the images that entered each layer.
        text_tokens: Of the prompt.
        new_tokens: Generated.
        cache_bytes: Keys and values after the prefill.
        memory_bytes: Largest resident set of this process so far.
    """

    repetition: Repetition
    visual_tokens: int
    layer_tokens: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    cache_bytes: int
    memory_bytes: int


class Repeatable(Protocol):
    """A loaded model that repeats its work."""

    def repeat(self) -> Done:
        """One prompt, and its answer."""

    def pictures(self) -> list[str]:
        """The overlay of each image in the last repetition, JPEG in base64; none where there is no grid."""


def elapsed(start: float) -> float:
    """Milliseconds since `time.perf_counter()` was `start`."""
    return (time.perf_counter() - start) * 1e3


def peak_memory() -> int:
    """Largest resident set of this process, in bytes.

    Linux's own count for `getrusage` includes what the parent had when it started this process; VmHWM is of
    this program alone.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in found:
            return int(found["VmHWM"].split()[0]) * 1024
    import resource
    import sys

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
