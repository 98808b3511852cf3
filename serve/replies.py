"""Replies as bytes: JSON, and how an ASGI application sends them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

__all__ = ["Send", "json_bytes", "send_event", "send_reply"]

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
"""How an ASGI application sends the parts of a reply."""


def json_bytes(value: Any) -> bytes:
    """Return JSON in UTF-8 on one line. Half a surrogate pair, which UTF-8 cannot show, becomes "?"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def send_reply(
    send: Send,
    status: int,
    body: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    kind: str = "application/json",
) -> None:
    """Send a whole reply.

    Args:
        send: Sends its parts.
        status: HTTP status.
        body: The body.
        headers: Headers beside its type and length.
        kind: Type of the body.
    """
    own = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_event(send: Send, data: bytes, *, last: bool = False) -> None:
    """Send a server-sent event.

    Args:
        send: Sends the parts of a reply.
        data: Data of the event.
        last: Whether the reply ends with it.
    """
    body = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": not last})
