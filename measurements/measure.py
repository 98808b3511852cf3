"""Shared parts of the measurements: the prompt, the image, summaries of repetitions, memory of a process.

This module imports neither PyTorch nor visprune, so that it can be used in a process whose memory is
measured.
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

__all__ = ["TEXT_TOKENS", "Memory", "Summary", "pixels", "polling", "processor", "prompt", "ratio"]

TEXT_TOKENS = 64
"""Text tokens of a prompt, besides the tokens of its image."""

# Instructions that make a dtype fast, on x86-64 and then on aarch64.
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_IDS = range(10, 400)  # ids that every tokenizer here has, without special tokens


def prompt(image_token_id: int, visual_tokens: int) -> list[int]:
    """Return token ids: half of the text, the placeholders of the image, the other half of the text."""
    known = [token for token in _IDS if token != image_token_id]
    words = np.random.default_rng(0).choice(known, TEXT_TOKENS).tolist()
    half = TEXT_TOKENS // 2
    return [*words[:half], *[image_token_id] * visual_tokens, *words[half:]]


def pixels() -> NDArray[np.float32]:
    """Return random pixels of one image for CLIP ViT-L/14-336, [1, 3, 336, 336]."""
    return np.random.default_rng(0).normal(size=(1, 3, 336, 336)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and spread of repetitions.

    Attributes:
        median: Median, in the unit of the values.
        spread: Interquartile range as a share of the median; 0 if the median is 0.
    """

    median: float
    spread: float

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """Summarize at least two values."""
        low, median, high = statistics.quantiles(values, n=4)
        return Summary(median, (high - low) / median if median else 0.0)


def processor() -> str:
    """Return the name of the processor, and its instructions that make a dtype fast; Linux only."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    found = {name.strip(): value.strip() for name, value in lines}
    flags = (found.get("flags") or found.get("Features", "")).split()
    return " ".join([found.get("model name", "unknown processor"), *(f for f in _INSTRUCTIONS if f in flags)])


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of value / other. Drift from round to round cancels in the quotients."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process in MB.

    Attributes:
        resident: Resident set, VmRSS.
        anonymous: Part of the resident set that is private to the process.
        mapped: Part of the resident set that is in files: mapped weights, libraries.
        peak: Largest resident set so far, VmHWM.
    """

    resident: float
    anonymous: float
    mapped: float
    peak: float

    @staticmethod
    def of(process: str = "self") -> Memory:
        """Read the memory of a process by its id, or of this process; Linux only.

        Raises:
            OSError, KeyError: The process has ended.
        """
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
        return Memory(*(int(found[name].split()[0]) * 1024 / 1e6 for name in names))


@contextmanager
def polling(read: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `read` in a thread while the block runs, with a pause of some seconds between the calls."""
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
