"""Memory of conversations: what they may take together, and what one of them needs.

While the decoder computes a token, ONNX Runtime writes the new keys and values beside the old ones. So a
conversation counts twice its keys and values as long as it is active, which is simple and never too little:
only one conversation computes at a time. The caches of pictures and of prefixes have bounds of their own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visprune.cores import available_memory
from visprune.errors import InputError, UnsupportedError
from visprune.units import in_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from visprune.runtime import Pipeline, Turn

__all__ = ["FRACTION", "MemoryPlan", "longest", "memory_needed", "resident_memory", "warm_up"]

FRACTION = 0.75
"""Part of the memory left after loading that conversations and caches may take. The rest is for the graphs'
intermediate results, which grow with the prompt, and for requests that are read."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory as it was measured after all models were loaded, in bytes.

    Attributes:
        resident: What this process has in memory; None if the system does not say.
        left: What the machine has left; None if the system does not say.
        caches: What the caches of pictures and prefixes may take.
        conversations: What the active conversations may take together; None for no bound.
    """

    resident: int | None
    left: int | None
    caches: int
    conversations: int | None

    @classmethod
    def measure(cls, bound: int | None, pipelines: Iterable[Pipeline]) -> MemoryPlan:
        """Measure this process and the machine.

        Args:
            bound: What conversations may take, if the user gave it. By default a `FRACTION` of what is left,
                less the caches; no bound if the system does not say what is left. That is the machine's own
                memory, so a GPU with memory of its own needs a bound from the user.
            pipelines: All pipelines, whose caches have limits. Where the caches would take more than half of
                that `FRACTION`, their limits are lowered.
        """
        left = available_memory()
        caches = [cache for p in pipelines for cache in (p.caches.pictures, p.caches.prefixes)]
        wanted = sum(cache.limit for cache in caches)
        if bound is None and left is not None:
            room = int(FRACTION * left)
            if wanted > room // 2:
                for cache in caches:
                    cache.limit = cache.limit * (room // 2) // wanted
            bound = room - sum(cache.limit for cache in caches)
        return cls(resident_memory(), left, sum(cache.limit for cache in caches), bound)

    def check(self, needed: int) -> None:
        """Refuse memory in which not even the shortest conversation fits.

        Args:
            needed: Bytes that such a conversation needs.

        Raises:
            UnsupportedError: There is too little.
        """
        if self.conversations is not None and self.conversations < needed:
            raise UnsupportedError(
                f"Conversations may take {in_bytes(self.conversations)} of memory, and a short one needs "
                f"{in_bytes(needed)}.",
                "Give a larger --memory, free some memory, or serve fewer or smaller bundles.",
            )

    def __str__(self) -> str:
        parts = [
            f"the process has {in_bytes(self.resident)}" if self.resident is not None else "",
            f"{in_bytes(self.left)} are left" if self.left is not None else "",
            f"caches may take {in_bytes(self.caches)}",
            "conversations have no bound"
            if self.conversations is None
            else f"conversations may take {in_bytes(self.conversations)}",
        ]
        return "Memory: " + ", ".join(part for part in parts if part) + "."


def longest(pipeline: Pipeline, turn: Turn) -> int:
    """Return the number of tokens of a conversation when its answer is as long as it may get."""
    return min(turn.tokens_in + turn.max_new_tokens, pipeline.manifest.decoder.context_limit)


def memory_needed(pipeline: Pipeline, tokens: int) -> int:
    """Return the bytes that an active conversation of so many tokens needs: twice its keys and values."""
    return 2 * pipeline.cache_bytes(tokens)


def warm_up(pipeline: Pipeline) -> int:
    """Answer one small turn, so that the memory measured afterwards includes the graphs' own.

    The turn has a picture, unless the model takes none. Nothing of it stays in the caches.

    Returns:
        The bytes that this conversation needs; 0 if the model refuses it.

    Raises:
        VispruneError: The model cannot compute.
    """
    from PIL import Image

    from visprune.runtime import Message

    needed = 0
    for message in (Message("user", [Image.new("RGB", (64, 64)), "Hi"]), Message("user", "Hi")):
        with suppress(InputError, UnsupportedError):  # no pictures, or no room for one
            turn = pipeline.prepare([message], max_new_tokens=2)
            stream = pipeline.answer(turn)
            while stream.step() is not None:
                pass
            needed = memory_needed(pipeline, longest(pipeline, turn))
            break
    pipeline.caches.pictures.clear()
    pipeline.caches.prefixes.clear()
    return needed


def resident_memory() -> int | None:
    """Return the bytes that this process has in memory; None if the system does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return None
