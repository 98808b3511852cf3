"""Runs of one engine that were captured as CUDA graphs, found again by their shapes and addresses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from visprune.errors import UnsupportedError, VispruneError
from visprune.runtime.backends.device import Device, Recording

__all__ = ["Key", "Recordings"]

_MAX_RECORDINGS = 4  # of one engine, one for each of the conversations that take turns

Key: TypeAlias = tuple[Any, ...]
"""All that a recording depends on."""


class Recordings:
    """The last few runs that came twice in a row.

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
        """Put a run on the stream if it was captured; whether it was."""
        if key not in self._made:
            return False
        self._made[key] = found = self._made.pop(key)  # the last one used is the last to go
        found[0].launch()
        return True

    def repeats(self, key: Key) -> bool:
        """Whether a run that was not captured is like the one before it, so that it should be."""
        again, self._last = self._enabled and key == self._last, key
        return again

    def capture(self, key: Key, context: Any, work: Callable[[], None]) -> None:
        """Capture a run.

        Args:
            key: What it is found by.
            context: Of TensorRT; nothing else may use it, as what is captured refers to it.
            work: Puts the run on the stream. It was done before in this context, since a context prepares
                things when it runs first, which cannot be captured.
        """
        self._device.synchronize()
        try:
            if not getattr(context, "is_stream_capturable", lambda _: True)(self._device.stream):
                raise UnsupportedError("TensorRT says that this engine cannot be captured.", "")
            recording = self._device.record(work)
        except VispruneError as error:
            self.give_up(error)
            return
        while len(self._made) >= _MAX_RECORDINGS:  # the one not used for longest makes room
            self._made.pop(next(iter(self._made)))[0].close()
        self._made[key] = (recording, context)

    def give_up(self, error: VispruneError) -> None:
        """Capture nothing from here on, and say why."""
        self._enabled = False
        warnings.warn(
            f"{self._graph} runs without a CUDA graph, which is slower: {error.what}",
            RuntimeWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Free them."""
        for recording, _ in self._made.values():
            recording.close()
        self._made = {}
