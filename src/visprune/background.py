"""Work that goes on beside the main thread, and ends when nobody waits for it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

__all__ = ["Beside"]

T = TypeVar("T")


class Beside:
    """One thread that does what it is given, in order.

    Where the block is left by an exception, such as Ctrl-C, what has not begun is dropped, and what has is
    to end soon: it calls `heed` from time to time, which raises then. Whoever cleans up after the block can
    be sure that nothing writes any more.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._given_up = threading.Event()

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            self._given_up.set()
        self._pool.shutdown(cancel_futures=kind is not None)

    def submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Have `work(*args)` done; what it raises, `result` of the future raises."""
        return self._pool.submit(work, *args)

    def heed(self) -> None:
        """Go on, or raise where nobody waits for the work any more."""
        if self._given_up.is_set():
            raise CancelledError
