"""A chat completion: from the body of a request to its whole or streamed answer."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.responses import Response

from visprune.serve import refusals
from visprune.serve.answer_forms import ChatCompletionChunk, Figures
from visprune.serve.answers import Answer, as_json, figures
from visprune.serve.asked import Asked, prepare
from visprune.serve.errors import Refusal
from visprune.serve.guard import RequestRecord, record_of
from visprune.serve.jobs import Job
from visprune.serve.limits import Receive, first_headers, read_body
from visprune.serve.replies import Send, json_bytes, send_event, send_reply
from visprune.serve.service import Front, Service

if TYPE_CHECKING:
    from visprune.runtime import Generation

__all__ = ["Answering", "Completion", "answer"]

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would hold pieces back
]


Answering: TypeAlias = Callable[[bytes, Send, RequestRecord], Coroutine[Any, Any, None]]
"""Answers the body of a request: sends the reply, and fills the record."""


class Completion(Response):
    """The reply to one request. As an ASGI application it reads the request itself.

    Args:
        front: The server.
        answer: Answers the request's body.
    """

    def __init__(self, front: Front, answer: Answering) -> None:
        super().__init__()
        self._front, self._answer = front, answer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer the request. A client that goes away ends it at the next token."""
        options = self._front.options
        with self._front.place():
            headers = first_headers(scope["headers"])
            record = record_of(scope)
            # The body is passed on and not kept, so that a queued request holds no memory for it.
            work = self._answer(
                await read_body(headers, receive, options.size("max_body"), options.client_timeout),
                send,
                record,
            )
            done = await _unless_gone(work, receive)
            if not done and record.tokens_out is None:
                record.code = "client_gone"


async def answer(service: Service, body: bytes, send: Send, record: RequestRecord) -> None:
    """Answer a request with the models of this process.

    Args:
        service: The server.
        body: Body of the request.
        send: Sends the reply.
        record: Takes what is logged of the request.

    Raises:
        Refusal: The request cannot be answered. If a part of the answer was sent, the refusal was sent too.
    """
    asked = await prepare(service, body)
    del body  # a queued request holds no memory for it
    record.model, record.tokens_in = asked.model, asked.turn.tokens_in
    async with service.scheduler.submit(asked.model, asked.turn) as job:
        reply = _Reply(service, asked, job, Answer(f"chatcmpl-{record.id}", asked.model))
        result = await (reply.stream(send) if asked.stream else reply.whole(send))
    record.tokens_out, record.cached = len(result.token_ids), result.tokens_cached
    if asked.texts is not None:
        record.texts = {"asked": asked.texts, "answered": result.text}


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer on its way to a client.

    Attributes:
        service: The server.
        asked: What was asked.
        job: The answer that is being computed.
        answer: Makes the parts of the reply.
    """

    service: Service
    asked: Asked
    job: Job
    answer: Answer

    async def whole(self, send: Send) -> Generation:
        """Send the whole answer, and return it.

        Raises:
            Refusal: There is none.
        """
        async with aclosing(self.job.events()) as events:
            async for event in events:
                if not isinstance(event, str):
                    completion = self.answer.whole(event, await self._figures(event))
                    await send_reply(send, 200, json_bytes(as_json(completion)))
                    return event
        raise refusals.internal_error()

    async def stream(self, send: Send) -> Generation:
        """Send the answer in pieces, and return it.

        The status is sent with the first piece, so that a request which is ended in the queue gets its own.

        Raises:
            Refusal: There is no answer, or only a part of it, after which the refusal was sent too.
        """
        answer, begun = self.answer, False

        async def put(chunk: ChatCompletionChunk) -> None:
            await send_event(send, json_bytes(as_json(chunk)))

        async with aclosing(self.job.events()) as events:
            try:
                async for event in events:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                        await put(answer.begin())
                        begun = True
                    if isinstance(event, str):
                        await put(answer.piece(event))
                        continue
                    await put(answer.end(event, await self._figures(event)))
                    if self.asked.usage:
                        await put(answer.count(event))
                    await send_event(send, b"[DONE]", last=True)
                    return event
            except Refusal as refusal:
                if begun:
                    await send_event(send, json_bytes(refusal.body()), last=True)
                raise
        raise refusals.internal_error()

    async def _figures(self, result: Generation) -> Figures:
        """Return the figures of the answer, with the pictures if they are asked for."""
        files, overlays = self.asked.files, None
        if files is not None:
            overlays = await self.service.work(lambda: self._overlays(files, result))
        return figures(result, self.asked.turn.keep.tokens, self.job.queue_ms or 0.0, overlays)

    def _overlays(self, files: Sequence[bytes], result: Generation) -> list[str]:
        """Return each picture with its dropped patches dimmed, as a data: URL."""
        found = []
        images = self.service.pictures.decode(files)
        for image, kept, merged in zip(images, result.keep_indices, result.merged_indices, strict=True):
            drawn = self.asked.pipeline.overlay(
                image,
                kept,
                images=len(files),
                merged_indices=merged,
                keep_tokens=self.asked.turn.keep.tokens,
            )
            file = io.BytesIO()
            drawn.save(file, "PNG")
            found.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
        return found


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Await some work, or cancel it when the client goes away; return whether the work was done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        done = task.done()
        if done:
            task.result()
        return done
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
