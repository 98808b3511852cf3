"""The records that the measuring command and its workers exchange, and helpers with which a worker measures.

Each request and each reply is a line of JSON; `worker` describes them.
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
    """The model that one row runs: a bundle, or a checkpoint in PyTorch.

    A bundle keeps the tokens that it was exported for if neither `keep_tokens` nor `ratio` is given.

    Attributes:
        name: Name of the row.
        role: Why the row is there.
        path: Directory of the bundle or checkpoint.
        keep_tokens: Visual tokens kept of one tile.
        ratio: Fraction of visual tokens kept.
        dtype: Data type in PyTorch; None for a bundle.
        chat_template: In PyTorch, a file that replaces the checkpoint's chat template.
        adapters: In PyTorch, directories of adapters to merge.
        vision_tower: In PyTorch, directory of the vision tower if it is not the checkpoint's own.
    """

    name: str
    role: Role
    path: str
    keep_tokens: int | None = None
    ratio: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    chat_template: str | None = None
    adapters: tuple[str, ...] = ()
    vision_tower: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The reply to a request to load: the milliseconds that loading took."""

    load: float


@dataclass(frozen=True, slots=True)
class Done:
    """The reply to a request to repeat: times, and counts of tokens and bytes.

    Attributes:
        repetition: The times.
        visual_tokens: Visual tokens of the prompt before pruning.
        layer_tokens: Visual tokens that entered each layer.
        text_tokens: Text tokens of the prompt.
        new_tokens: Generated tokens.
        cache_bytes: Size of keys and values after the prefill.
        memory_bytes: Largest resident set of the worker so far.
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
        """Run one prompt, and generate its answer."""

    def overlays(self) -> list[str]:
        """Return the overlay of each image in the last repetition, JPEG in base64; empty without a grid."""


def elapsed(start: float) -> float:
    """Return the milliseconds since `time.perf_counter()` was `start`."""
    return (time.perf_counter() - start) * 1e3


def peak_memory() -> int:
    """Return the largest resident set of this process, in bytes.

    On Linux, the value of `getrusage` includes the memory of the parent when it started this process. VmHWM
    covers this program alone, and is read instead.
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
