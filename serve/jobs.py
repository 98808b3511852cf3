"""One request between the event loop, where its client waits, and the thread that computes its answer.

A job knows how its pieces and its outcome get from the thread to the event loop. When it computes and when it
is ended is for the scheduler to say.
"""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from copy import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any

from visprune.errors import VispruneError
from visprune.serve import refusals
from visprune.serve.errors import Refusal, refusal_of
from visprune.serve.memory import longest, memory_needed
from visprune.terminal import note

if TYPE_CHECKING:
    from visprune.runtime import Generation, Pipeline, Stream, Turn
    from visprune.serve.metrics import Metrics

__all__ = ["Job", "report"]


class Job:
    """A request that was accepted. `Scheduler.submit` makes it, in the event loop of its client.

    Use it in an `async with` statement, which cancels it when the block is left:

        async with scheduler.submit(model, turn) as job:
            async for event in job.events(): ...

    Args:
        model: Name of the model.
        pipeline: Pipeline of the model.
        turn: What `pipeline.prepare` gave.
        end: Called with this job and the refusal when it is cancelled; from any thread.

    Attributes:
        id: Name of the request, unique in this process and beyond.
        submitted: Time of its arrival, of `time.monotonic`.
        admitted: Time when it left the queue; until then that of its arrival.
        length: Tokens of the conversation at its longest.
        memory: Bytes that it needs while it is active.
        generated: Number of tokens generated so far.
        queue_ms: Milliseconds between its arrival and its first computation, or None.
        outcome: How it ended, or None. The scheduler sets it once.
    """

    def __init__(
        self,
        model: str,
        pipeline: Pipeline,
        turn: Turn,
        end: Callable[[Job, Refusal], None],
    ) -> None:
        self.id = uuid.uuid4().hex
        self.model = model
        self.pipeline = pipeline
        self.turn = turn
        self.length = longest(pipeline, turn)
        self.memory = memory_needed(pipeline, self.length)
        self.submitted = time.monotonic()
        self.admitted = self.submitted
        self.generated = 0
        self.queue_ms: float | None = None
        self.outcome: Generation | Refusal | None = None
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Generation | Refusal] = asyncio.Queue()
        self._timers: list[asyncio.TimerHandle] = []
        self._stream: Stream | None = None  # only the thread of the models touches it
        self._last_token = 0.0

    def cancel(self, cause: str = "client_gone") -> None:
        """End the job, unless it has ended. Its stream is closed at the next token. From any thread.

        Args:
            cause: Why, as the metrics count it.
        """
        self._end(self, refusals.cancelled(cause))

    async def events(self) -> AsyncGenerator[str | Generation, None]:
        """Yield pieces of text as they become final, then the whole answer. Call it once.

        Leaving the iteration early cancels the job when the generator is closed.

        Raises:
            Refusal: The job was ended by an error, a time limit, the end of the server or `cancel`, perhaps
                after some pieces.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Refusal):
                    raise copy(event)  # an exception refers to this frame, and the frame to the job
                yield event
                if not isinstance(event, str):
                    return
        finally:
            self.cancel()

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def limit(self, seconds: float, expire: Callable[[Job], None]) -> None:
        """Call `expire` with this job in its event loop after a time, unless the job has ended by then."""
        self._timers.append(self._loop.call_later(seconds, expire, self))

    def step(self, metrics: Metrics) -> Generation | Refusal | None:
        """Compute one token, and send the text that is final by it. In the thread of the models.

        Returns:
            The answer if it is complete, the refusal if an error ends it, and otherwise None.
        """
        try:
            return self._step(metrics)
        except VispruneError as error:
            return refusal_of(error)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            report(error)
            return refusals.internal_error()

    def free(self) -> None:
        """Free what the answer has computed. In the thread of the models."""
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        except BaseException as error:
            report(error)

    def close(self, outcome: Generation | Refusal) -> None:
        """Send the outcome to the client, and end the time limits. From any thread."""
        self._post(self._finish, outcome)

    def _step(self, metrics: Metrics) -> Generation | None:
        if self._stream is None:
            waited = time.monotonic() - self.submitted
            self.queue_ms = waited * 1e3
            metrics.started(self.model, waited)
            self._stream = self.pipeline.answer(self.turn)
        piece = self._stream.step()
        now = time.monotonic()
        if self.generated:
            metrics.later_token(self.model, now - self._last_token)
        else:
            metrics.first_token(self.model, now - self.submitted)
        self._last_token = now
        self.generated += 1
        if piece and not self._post(self._events.put_nowait, piece):
            self.cancel()
        return self._stream.result if self._stream.ended else None

    def _finish(self, outcome: Generation | Refusal) -> None:
        for timer in self._timers:
            timer.cancel()
        self._events.put_nowait(outcome)

    def _post(self, call: Callable[[Any], None], value: object) -> bool:
        """Call a function in the event loop; return whether there is one."""
        try:
            self._loop.call_soon_threadsafe(call, value)
        except RuntimeError:  # the loop was closed, so nobody waits for the answer
            return False
        return True


def report(error: BaseException) -> None:
    """Write on stderr where an error arose. Its message may hold a prompt or an answer, so it is left out."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    with suppress(OSError, ValueError):  # whoever read the log may be gone
        note(f"The server failed with {type(error).__name__}, which is a bug:\n{frames}")
