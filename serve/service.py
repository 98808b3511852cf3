"""What the web application works with: the models, the options, and the threads that prepare requests.

`Front` is all of that but the models, which may run elsewhere. `Service` runs them in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visprune.bundle import Bundle
from visprune.manifest import MANIFEST
from visprune.serve.admission import Limits
from visprune.serve.answer_forms import ModelCard
from visprune.serve.answers import card
from visprune.serve.auth import Keys
from visprune.serve.errors import Refusal
from visprune.serve.fetch import Fetcher
from visprune.serve.metrics import Metrics
from visprune.serve.model_host import ModelHost
from visprune.serve.models import ServedModel, model_ids
from visprune.serve.options import ServeOptions
from visprune.serve.pictures import PictureReader
from visprune.serve.refusals import request_timeout
from visprune.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from visprune.runtime import Pipeline

__all__ = ["Front", "Service"]

T = TypeVar("T")

_WORKERS = 2  # requests that are prepared at once: pictures are large while they are decoded
_FETCHERS = 4  # requests whose pictures are fetched at once


class Front:
    """The part of the server that its clients meet.

    Args:
        paths: Directories of the bundles.
        options: The options.

    Attributes:
        options: The options.
        keys: Keys of clients.
        cards: Description of each model, by its name.
        metrics: The figures.
        scheduler: Runs the models.

    Raises:
        VispruneError: A bundle or the file of keys cannot be read, or a package is missing.
    """

    scheduler: ModelHost

    def __init__(self, paths: Sequence[Path], options: ServeOptions) -> None:
        from visprune.runtime.backends import backend
        from visprune.runtime.loading import check_threads

        backend(options.provider)
        if options.threads is not None:
            check_threads(options.threads)
        self._models = [ServedModel(*pair) for pair in zip(model_ids(paths), paths, strict=True)]
        manifests = {model.id: Bundle.open(model.path).manifest for model in self._models}
        self.options = options
        self.keys = Keys.read(options.api_key_file) if options.api_key_file else Keys()
        self.cards: dict[str, ModelCard] = {
            model.id: card(
                model.id,
                manifests[model.id],
                int((model.path / MANIFEST).stat().st_mtime),
                needs_auth=self.keys.any,
            )
            for model in self._models
        }
        self.metrics = Metrics()
        self._places = options.replicas * (options.max_active + options.max_queue)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places of requests that are read, queued or answered.

        A request takes its place before its body is read, so that no number of clients can fill the memory.

        Raises:
            Refusal: 503, the models do not run (yet); 429, all places are taken.
        """
        self.scheduler.check()
        if not self._places:
            message = "All places for requests are taken. Try again later."
            raise Refusal(429, "queue_full", message, retry_after=self.scheduler.retry_after)
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    def close(self, seconds: float = 0.0) -> bool:
        """End all threads; return whether the models have ended within so many seconds."""
        return self.scheduler.stop(seconds)


class Service(Front):
    """The server with its models, without its web application.

    Args:
        paths: Directories of the bundles.
        options: The options.

    Attributes:
        pictures: Reads pictures.
    """

    scheduler: Scheduler

    def __init__(self, paths: Sequence[Path], options: ServeOptions) -> None:
        super().__init__(paths, options)
        limits = Limits(
            options.max_active,
            options.max_queue,
            options.queue_timeout,
            options.request_timeout,
            options.size("memory") or None,
        )
        self.scheduler = Scheduler(self._models, self._load, limits, self.metrics)
        self.pictures = PictureReader(
            Fetcher.of(options.allow_url or (), options.size("max_body")), options.max_pixels
        )
        self._workers = ThreadPoolExecutor(_WORKERS, "prepare")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
        self._called: set[Future[Any]] = set()  # what runs in these threads, or waits for one

    async def work(self, function: Callable[[], T]) -> T:
        """Call a function in one of the threads that prepare requests.

        Raises:
            Refusal: It takes longer than a request may.
        """
        return await self._call(self._workers, function)

    async def fetch(self, function: Callable[[], T]) -> T:
        """Call a function that may wait for other machines in one of the threads for that, as `work` does."""
        return await self._call(self._fetchers, function)

    async def _call(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        called = pool.submit(function)
        self._called.add(called)
        called.add_done_callback(self._called.discard)
        waiting = asyncio.wrap_future(called)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=self.options.request_timeout)
        finally:
            waiting.cancel()  # no effect once it is done; a thread that runs cannot be stopped
        if not done:
            raise request_timeout(self.options.request_timeout)
        return waiting.result()

    def close(self, seconds: float = 0.0) -> bool:
        """End all threads; return whether the models have ended within so many seconds."""
        for pool in (self._workers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        return super().close(seconds) and not self._called

    def _load(self, model: ServedModel) -> Pipeline:
        from visprune.runtime import load

        options = self.options
        return load(
            model.path,
            provider=options.provider,
            threads=options.threads,
            low_memory=options.low_memory,
            picture_cache=options.size("picture_cache"),
            prefix_cache=options.size("prefix_cache"),
        )
