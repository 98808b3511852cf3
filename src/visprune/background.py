"""A background thread whose work is cancelled when the main thread fails or is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

__all__ = ["BackgroundThread"]

T = TypeVar("T")


class BackgroundThread:
    """One thread that does the submitted work in the order of submission; used as a context manager.

    If an exception such as Ctrl-C leaves the block, work that has not begun is dropped. Work that has begun
    must call `check_cancelled` from time to time, which then raises. The block returns only when the thread
    is done, so whoever cleans up afterwards can be sure that nothing is writing any more.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._cancelled = threading.Event()

    def __enter__(self) -> BackgroundThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            self._cancelled.set()
        self._pool.shutdown(cancel_futures=kind is not None)

    def submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Queue `work(*args)`; the future's `result` returns what it returned, or raises what it raised."""
        return self._pool.submit(work, *args)

    def check_cancelled(self) -> None:
        """Raise `CancelledError` if an exception has left the block; otherwise do nothing."""
        if self._cancelled.is_set():
            raise CancelledError
