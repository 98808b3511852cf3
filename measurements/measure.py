"""What the measurements share: the prompt, the picture, what is said of repetitions, a process's memory.

It imports neither PyTorch nor visprune, so that it can be used in any process whose memory is measured.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TEXT_TOKENS", "Memory", "Middle", "pixels", "polling", "processor", "prompt", "ratio"]

TEXT_TOKENS = 64
"""Tokens of a prompt beside those of its image."""

# x86-64, then aarch64
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_IDS = range(10, 400)  # of tokens that every tokenizer here has, special ones left out


def prompt(image_token_id: int, visual_tokens: int) -> list[int]:
    """Half of the text, the placeholders of the image, the other half."""
    known = [token for token in _IDS if token != image_token_id]
    words = np.random.default_rng(0).choice(known, TEXT_TOKENS).tolist()
    half = TEXT_TOKENS // 2
    return [*words[:half], *[image_token_id] * visual_tokens, *words[half:]]


def pixels() -> NDArray[np.float32]:
    """One image as CLIP ViT-L/14-336 takes it, [1, 3, 336, 336]."""
    return np.random.default_rng(0).normal(size=(1, 3, 336, 336)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Middle:
    """What is said of repetitions.

    Attributes:
        median: In the unit of the values.
        spread: The interquartile range as a share of the median; 0 where the median is.
    """

    median: float
    spread: float

    @staticmethod
    def of(values: Sequence[float]) -> Middle:
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4)
        return Middle(median, (high - low) / median if median else 0.0)


def processor() -> str:
    """Its name and which instructions it has that make a dtype fast, on Linux."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    found = {name.strip(): value.strip() for name, value in lines}
    flags = (found.get("flags") or found.get("Features", "")).split()
    return " ".join([found.get("model name", "unknown processor"), *(f for f in _INSTRUCTIONS if f in flags)])


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of value / other, so that drift between rounds cancels."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process, in MB.

    Attributes:
        resident: Its resident set, VmRSS.
        anonymous: The part of it that is the process's own.
        mapped: The part of it that is in files: weights that are mapped, libraries.
        peak: The largest resident set so far, VmHWM.
    """

    resident: float
    anonymous: float
    mapped: float
    peak: float

    @staticmethod
    def of(process: str = "self") -> Memory:
        """Of a process by its number, or of this one, on Linux.

        Raises:
            OSError, KeyError: It has ended.
        """
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
        return Memory(*(int(found[name].split()[0]) * 1024 / 1e6 for name in names))


@contextmanager
def polling(read: Callable[[], None], seconds: float) -> Iterator[None]:
    """While this is entered, `read` is called in a thread, with so long a pause between."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(seconds):
            read()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
