"""Runners that are opened when they are first used, and closed where others need their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from visprune.runtime.backends.device import DeviceMemoryError
from visprune.runtime.backends.runner import Runner, Specs, Value

__all__ = ["Resident", "Residents"]


@dataclass(frozen=True, slots=True)
class Resident:
    """The runner of one graph, whether it is open or not."""

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
    """Which runners are open, the last used at the end.

    Args:
        open_runner: Opens that of a graph.
        needs: About how many bytes it takes.
        free: How many there are.
        evict: Whether others may be closed for one that is used.
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
        """The graphs whose runners are open, the last used at the end."""
        return tuple(self._open)

    def use(self, graph: str) -> Runner:
        """The runner of a graph; opens it, and closes others for it where that is allowed.

        Raises:
            DeviceMemoryError: It does not fit, even alone.
        """
        runner = self._open.pop(graph, None)
        if runner is None:
            while self._needs(graph) > self._free() and self._close_oldest(0):
                pass
            runner = self._open_with_room(graph)
        self._open[graph] = runner
        return runner

    def make_room(self) -> bool:
        """Close the runner that was not used for longest, but for the last used; whether there was one."""
        return self._close_oldest(1)

    def close(self, graph: str) -> None:
        """Close the runner of a graph, if it is open."""
        if runner := self._open.pop(graph, None):
            runner.__exit__(None, None, None)

    def _open_with_room(self, graph: str) -> Runner:
        while True:
            try:
                return self._open_runner(graph)
            except DeviceMemoryError:  # it takes more than was thought
                if not self._close_oldest(0):
                    raise

    def _close_oldest(self, left: int) -> bool:
        if not self._evict or len(self._open) <= left:
            return False
        self.close(next(iter(self._open)))
        return True
