"""More than one machine: replicas of the models in a Ray cluster, behind one server.

This process has the sockets, the keys, the page and all limits. It sends the body of each request for a
completion to a replica, which Ray Serve chooses, and passes on what comes back. Ray Serve starts a replica
again if it dies. Requests that were with it are refused, so that their clients send them again.

Ray's own HTTP server is not used: it has none of these limits, and answers 500 if a replica dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from visprune.serve import refusals
from visprune.serve.errors import Refusal
from visprune.serve.guard import RequestRecord
from visprune.serve.jobs import report
from visprune.serve.options import ServeOptions
from visprune.serve.replicas import Replicas
from visprune.serve.replies import Send, json_bytes, send_event
from visprune.serve.service import Front

__all__ = ["Cluster"]


class Cluster(Front):
    """The part of the server that its clients meet, with the models elsewhere.

    Args:
        paths: Directories of the bundles, the same on every machine.
        options: The options.

    Raises:
        VispruneError: A bundle or the file of keys cannot be read, or a package is missing.
    """

    scheduler: Replicas

    def __init__(self, paths: Sequence[Path], options: ServeOptions) -> None:
        super().__init__(paths, options)
        self.scheduler = Replicas([path.resolve() for path in paths], options, self.metrics)

    async def answer(self, body: bytes, send: Send, record: RequestRecord) -> None:
        """Answer a request with one of the replicas.

        Args:
            body: Body of the request.
            send: Sends the reply.
            record: Takes what is logged of the request.

        Raises:
            Refusal: The request cannot be answered, or the replica died. If a part of the answer was sent,
                the refusal was sent too.
        """
        begun = False
        held: list[MutableMapping[str, Any]] = []
        async with self.scheduler.ask(body, record.id) as parts:
            try:
                async for part in parts:
                    kind = part["type"]
                    if kind == "record":
                        _take(record, part["record"])
                    elif kind != "refusal":
                        held.append(part)
                        if not part.get("more_body", False):
                            continue  # the body follows the head, and the record the end of the body
                    for one in held:
                        await send(one)
                        begun = True
                    held.clear()
                    if kind == "refusal":
                        raise Refusal(**part["refusal"])
            except self.scheduler.bug as error:
                report(error)
                lost = refusals.internal_error()
            except self.scheduler.died:
                lost = refusals.replica_died()
            except asyncio.TimeoutError:  # the replica hangs, or none is left
                lost = refusals.queue_timeout(self.scheduler.patience, self.scheduler.retry_after)
            else:
                return
            if begun:
                await send_event(send, json_bytes(lost.body()), last=True)
            raise lost


def _take(record: RequestRecord, found: dict[str, Any]) -> None:
    """Take what a replica noted of a request. The status and the code are this process's to note."""
    for field in fields(record):
        if field.name not in ("status", "code"):
            setattr(record, field.name, found[field.name])
