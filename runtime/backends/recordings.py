"""CUDA graphs of one engine's runs, found by the shapes and addresses of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from visprune.errors import UnsupportedError, VispruneError
from visprune.runtime.backends.device import Device, Recording

__all__ = ["Key", "Recordings"]

_MAX_RECORDINGS = 4  # of one engine: one for each of a few conversations that take turns

Key: TypeAlias = tuple[Any, ...]
"""Everything that a captured run depends on: profile, shapes, addresses, values in host memory."""


class Recordings:
    """CUDA graphs of the last few runs that occurred twice in a row.

    Args:
        device: The GPU.
        graph: Name for messages.
    """

    def __init__(self, device: Device, graph: str) -> None:
        self._device = device
        self._graph = graph
        self._made: dict[Key, tuple[Recording, Any]] = {}
        self._last: Key = ()
        self._enabled = True

    def launch(self, key: Key) -> bool:
        """Queue a run on the stream if it was captured. Return whether it was."""
        if key not in self._made:
            return False
        self._made[key] = found = self._made.pop(key)  # moved to the end: the last one to be discarded
        found[0].launch()
        return True

    def repeats(self, key: Key) -> bool:
        """Return whether a run equals the one before it, so that it should be captured."""
        again, self._last = self._enabled and key == self._last, key
        return again

    def capture(self, key: Key, context: Any, work: Callable[[], None]) -> None:
        """Capture a run.

        Args:
            key: Key of the run.
            context: TensorRT's execution context. Nothing else may use it, because the captured graph refers
                to it.
            work: Queues the run on the stream. It must have run once in this context, because the first run
                of a context does preparations that cannot be captured.
        """
        self._device.synchronize()
        try:
            if not getattr(context, "is_stream_capturable", lambda _: True)(self._device.stream):
                raise UnsupportedError("TensorRT reports that this engine cannot be captured.", "")
            recording = self._device.record(work)
        except VispruneError as error:
            self.give_up(error)
            return
        while len(self._made) >= _MAX_RECORDINGS:  # the least recently used one is discarded
            self._made.pop(next(iter(self._made)))[0].close()
        self._made[key] = (recording, context)

    def give_up(self, error: VispruneError) -> None:
        """Capture nothing from here on, and warn with the reason."""
        self._enabled = False
        warnings.warn(
            f"{self._graph} runs without a CUDA graph, which is slower: {error.what}",
            RuntimeWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Free all graphs."""
        for recording, _ in self._made.values():
            recording.close()
        self._made = {}
