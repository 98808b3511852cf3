"""Runners that are opened when they are first used, and closed when others need their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from visprune.runtime.backends.device import DeviceMemoryError
from visprune.runtime.backends.runner import Runner, Specs, Value

__all__ = ["Resident", "Residents"]


@dataclass(frozen=True, slots=True)
class Resident:
    """The runner of one graph. It opens when it is used, and may be closed again in between."""

    graph: str
    specs: Specs
    residents: Residents

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`."""
        return self.residents.use(self.graph).infer(feeds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.residents.close(self.graph)


class Residents:
    """The runners of a bundle that are open, ordered by their last use.

    Args:
        open_runner: Opens the runner of a graph.
        needs: Returns about how many bytes the runner of a graph takes.
        free: Returns the free bytes.
        evict: Whether a runner may be closed to make room for another.
    """

    def __init__(
        self,
        open_runner: Callable[[str], Runner],
        needs: Callable[[str], int],
        free: Callable[[], int],
        *,
        evict: bool,
    ) -> None:
        self._open_runner, self._needs, self._free, self._evict = open_runner, needs, free, evict
        self._open: dict[str, Runner] = {}

    @property
    def open(self) -> tuple[str, ...]:
        """Graphs whose runners are open, the last used one at the end."""
        return tuple(self._open)

    def use(self, graph: str) -> Runner:
        """Return the runner of a graph. Open it if needed, and close others for it if that is allowed.

        Raises:
            DeviceMemoryError: The runner does not fit.
        """
        runner = self._open.pop(graph, None)
        if runner is None:
            while self._needs(graph) > self._free() and self._close_oldest(0):
                pass
            runner = self._open_with_room(graph)
        self._open[graph] = runner
        return runner

    def make_room(self) -> bool:
        """Close the least recently used runner unless it is the only one. Return whether one was closed."""
        return self._close_oldest(1)

    def close(self, graph: str) -> None:
        """Close the runner of a graph, if it is open."""
        if runner := self._open.pop(graph, None):
            runner.__exit__(None, None, None)

    def _open_with_room(self, graph: str) -> Runner:
        """Open a runner, closing others until it fits."""
        while True:
            try:
                return self._open_runner(graph)
            except DeviceMemoryError:  # it takes more memory than estimated
                if not self._close_oldest(0):
                    raise

    def _close_oldest(self, left: int) -> bool:
        """Close the least recently used runner if more than `left` are open. Return whether it did."""
        if not self._evict or len(self._open) <= left:
            return False
        self.close(next(iter(self._open)))
        return True
