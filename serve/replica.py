"""A copy of the models in a process of a Ray cluster. `cluster` starts it and sends it requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from visprune.serve.completions import answer
from visprune.serve.errors import Refusal
from visprune.serve.guard import RequestRecord
from visprune.serve.options import ServeOptions
from visprune.serve.service import Service

__all__ = ["Replica"]


class Replica:
    """A Ray Serve deployment that answers requests with models of its own.

    It is ready when its models are loaded. Keys and headers are not its business.

    Args:
        paths: Directories of the bundles, the same on every machine.
        options: Options of the server.

    Raises:
        VispruneError: A bundle cannot be loaded on this machine.
    """

    async def __init__(self, paths: Sequence[Path], options: ServeOptions) -> None:  # type: ignore[misc]
        # Ray awaits this.
        self._service = Service(paths, replace(options, api_key_file=None, no_auth=True, replicas=1))
        self._service.scheduler.start()
        await self._service.scheduler.loaded()

    def check_health(self) -> None:
        """Tell Ray to replace this replica if its models do not run.

        Raises:
            RuntimeError: They do not.
        """
        if not self._service.scheduler.ready:
            raise RuntimeError(f"The models are {self._service.scheduler.state}.")

    async def answer(self, body: bytes, name: str) -> AsyncIterator[Mapping[str, Any]]:
        """Answer the body of a request.

        Args:
            body: The body.
            name: Id of the request.

        Yields:
            The reply as ASGI messages; after a refusal, one of the type "refusal" with its fields; and at the
            end one of the type "record" with what is logged.
        """
        record = RequestRecord(name)
        parts: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._answer(body, parts, record))
        try:
            while (part := await parts.get()) is not None:
                yield part
            await task
            yield {"type": "record", "record": asdict(record)}
        finally:  # also when the client is gone
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answer(
        self, body: bytes, parts: asyncio.Queue[Mapping[str, Any] | None], record: RequestRecord
    ) -> None:
        try:
            with self._service.place():
                await answer(self._service, body, parts.put, record)
        except Refusal as refusal:
            await parts.put({"type": "refusal", "refusal": asdict(refusal)})
        finally:
            await parts.put(None)
