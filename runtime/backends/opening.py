"""Graphs of a bundle that threads open, several at a time.

ONNX Runtime lays out the weights of a graph in one thread, and lets Python run meanwhile. So two graphs open
in the time of the larger one, and a graph that is open can run while others are still being opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from visprune.runtime.backends.runner import Runner, Specs, Value

__all__ = ["Opening", "begin_to_open"]


class Opening:
    """The runner of a graph that a thread opens. Whoever uses it waits until it is open.

    Args:
        runner: The runner to be, or the error for which there is none.
    """

    def __init__(self, runner: Future[Runner]) -> None:
        self._runner = runner

    @property
    def over(self) -> bool:
        """Whether `wait` returns at once."""
        return self._runner.done()

    def wait(self) -> Runner:
        """Return the runner once it is open.

        Raises:
            VispruneError: The graph cannot be opened.
        """
        return self._runner.result()

    @property
    def specs(self) -> Specs:
        """Inputs and outputs."""
        return self.wait().specs

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph; see `Runner.infer`."""
        return self.wait().infer(feeds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the runner once it is open. One whose turn has not come is not opened any more."""
        if not self._runner.cancel():
            with suppress(Exception):  # then there is nothing to close; whoever waited has the error
                self.wait().__exit__(kind, error, trace)


def begin_to_open(
    open_graph: Callable[[str], Runner], graphs: Iterable[str], threads: int
) -> dict[str, Opening]:
    """Begin to open graphs in other threads, and return at once.

    Args:
        open_graph: Opens a graph by its name.
        graphs: Names of the graphs, in the order in which they are begun.
        threads: Graphs to open at a time.

    Returns:
        A runner for each graph, in the same order. Close all of them, even if one cannot be opened.
    """
    pool = ThreadPoolExecutor(threads)
    openings = {graph: Opening(pool.submit(open_graph, graph)) for graph in graphs}
    pool.shutdown(wait=False)  # its threads end after the last graph
    return openings
