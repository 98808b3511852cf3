"""uvicorn's HTTP protocol with limits that it lacks: on slow clients, and on the number of clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from visprune.serve.errors import Refusal
from visprune.serve.guard import SECURITY_HEADERS
from visprune.serve.replies import json_bytes

__all__ = ["LimitedProtocol"]

_LINGER = 5.0  # seconds in which a body that was refused is read and dropped, so that its client sees why


class LimitedProtocol(H11Protocol):
    """A connection with a client.

    Three timers guard it. The head of a request must arrive in `seconds` after its first byte, or after the
    connection was made. A body that is not wanted is dropped for a few seconds. What is sent must be taken:
    if in `seconds` nothing was, the connection is cut, and the request is cancelled.

    Args:
        *args: As for the base class.
        seconds: Time limit of the client.
        most: The most connections at once.
        refused: Called with the code of each refusal.
        **kwargs: As for the base class.
    """

    def __init__(
        self, *args: Any, seconds: float, most: int, refused: Callable[[str], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._seconds, self._most, self._refused = seconds, most, refused
        self._head: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many connections."""
        super().connection_made(transport)
        self.transport = _Lingering(transport, self._has_more)  # type: ignore[assignment]
        # So that `pause_writing` tells of every byte that the client has not taken.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._most:
            refusal = Refusal(
                503, "too_many_connections", "Too many clients are connected. Try again later.", retry_after=5
            )
            self._refuse(refusal)
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self._head, self._rest, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on after a reply was sent."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Wait for the client to take what was sent."""
        super().pause_writing()
        if self._unread is None:
            self._wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Go on: the client has taken everything."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has a head that is too long."""
        # uvicorn calls this while it handles h11's error, which knows the status.
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            refusal = Refusal(431, "headers_too_large", "The head of the request is too long. Send less.")
        else:
            refusal = Refusal(400, "invalid_http", "This is not an HTTP request. Send one of HTTP/1.1.")
        self._refuse(refusal)

    def _watch(self) -> None:
        """Start or end the timers, by what is expected of the client."""
        idle = self.conn.their_state is h11.IDLE
        if not idle and self._head is not None:
            self._head.cancel()
            self._head = None
        waits = self.timeout_keep_alive_task is not None  # for another request: uvicorn has a timer for that
        if idle and self._head is None and not waits:
            self._head = self.loop.call_later(self._seconds, self._head_is_late)
        unwanted = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if not unwanted and self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if unwanted and self._rest is None:
            self._rest = self.loop.call_later(_LINGER, self.transport.close)

    def _has_more(self) -> bool:
        """Return whether the client is still sending a body."""
        return self.conn.their_state is h11.SEND_BODY

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(Refusal(408, "head_timeout", "The request did not arrive in time. Send it at once."))
        else:
            self.transport.close()

    def _wait_for_reader(self, before: int) -> None:
        """Look again after a while, and cut the connection if the client has taken nothing until then."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < before:
                self._wait_for_reader(left)
            else:
                self.transport.abort()

        self._unread = self.loop.call_later(self._seconds, look)

    def _refuse(self, refusal: Refusal) -> None:
        """Send a refusal, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            self._refused(refusal.code)
            body = json_bytes(refusal.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *SECURITY_HEADERS,
            ]
            if refusal.retry_after is not None:
                headers.append((b"retry-after", str(refusal.retry_after).encode()))
            head = h11.Response(status_code=refusal.status, headers=headers, reason=b"")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Lingering:
    """A transport that is closed only when the client had time to read the reply.

    The system resets a connection that is closed with unread bytes, and the client then loses the reply.

    Args:
        transport: The transport.
        has_more: Whether the client is still sending.
    """

    def __init__(self, transport: asyncio.Transport, has_more: Callable[[], bool]) -> None:
        self._transport, self._has_more = transport, has_more
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing more is taken from the client."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send the end. What still comes is dropped for a few seconds."""
        if self.is_closing() or not self._has_more() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._closing = True
        self._transport.resume_reading()
        self._transport.write_eof()
        asyncio.get_running_loop().call_later(_LINGER, self._transport.close)
