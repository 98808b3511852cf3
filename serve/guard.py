"""The outermost part of the web application: what must hold for every request, whatever its path.

It refuses before anything is read, sets the headers that make a browser careful, keeps errors from showing
anything, and writes one line a request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from visprune.serve import refusals
from visprune.serve.auth import Keys
from visprune.serve.errors import Refusal
from visprune.serve.jobs import report
from visprune.serve.limits import Hosts, check_head, check_site, first_headers
from visprune.serve.metrics import Metrics
from visprune.serve.replies import json_bytes, send_reply
from visprune.terminal import note

__all__ = ["Guard", "RequestRecord", "record_of", "refusal_headers"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[
    [Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

# Everything else needs a key, so that a path which is added is not open by mistake.
_OPEN = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
_OPEN_BELOW = "/page/"
_KEY = "visprune.record"  # in the scope

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = (
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Sent with every answer."""


@dataclass(slots=True)
class RequestRecord:
    """What the line of a request in the log says.

    Attributes:
        id: Name of the request, unique in this process and beyond. Its reply has it too.
        status: HTTP status that was sent; 499 if the client was gone before.
        code: Code of the refusal, or "-".
        model: Name of the model, or None.
        tokens_in: Tokens of the prompt, or None.
        tokens_out: Tokens of the answer, or None.
        cached: Tokens of the prompt that were cached.
        texts: What was asked and answered, if that is to be logged.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: int = 499
    code: str = "-"
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cached: int = 0
    texts: dict[str, Any] | None = None


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of a request."""
    record: RequestRecord = scope[_KEY]
    return record


class Guard:
    """An ASGI application around another.

    Args:
        app: The other.
        keys: Keys of clients.
        hosts: Names of the server.
        metrics: Counts refusals.
    """

    def __init__(self, app: App, keys: Keys, hosts: Hosts, metrics: Metrics) -> None:
        self._app, self._keys, self._hosts, self._metrics = app, keys, hosts, metrics

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        record = scope[_KEY] = RequestRecord()
        started = time.perf_counter()
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, record.status = True, message["status"]
                own = (b"x-request-id", record.id.encode())
                message["headers"] = [*message.get("headers", ()), own, *SECURITY_HEADERS]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, guarded)
        except Refusal as refusal:
            record.code = refusal.code
            await send_reply(guarded, refusal.status, json_bytes(refusal.body()), refusal_headers(refusal))
        except Exception as error:
            cause = error.__cause__
            if begun and isinstance(cause, Refusal):
                record.code = cause.code  # a stream has ended with it, and Starlette cannot send it again
                return
            record.code = "internal_error"
            report(error)
            if not begun:
                failed = refusals.internal_error()
                await send_reply(guarded, failed.status, json_bytes(failed.body()))
        finally:
            if record.code not in ("-", "client_gone"):
                self._metrics.refused(record.code)
            _write_line(scope, record, (time.perf_counter() - started) * 1e3)

    def _check(self, scope: Scope) -> None:
        check_head(scope["headers"], scope.get("raw_path") or b"")
        headers, path = first_headers(scope["headers"]), scope["path"]
        self._hosts.check(headers.get(b"host"))
        if path in _OPEN or path.startswith(_OPEN_BELOW):
            return
        check_site(headers)
        if not self._keys.allow(headers.get(b"authorization")):
            raise Refusal(
                401,
                "invalid_api_key",
                "The request has no key that this server knows. Send the header Authorization: Bearer KEY.",
            )


def refusal_headers(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    """Return the headers that a refusal has beside those of every answer."""
    headers = []
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="visprune"'))
    if refusal.status == 408:  # the rest of the request may still arrive
        headers.append((b"connection", b"close"))
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    return headers


def _write_line(scope: Scope, record: RequestRecord, milliseconds: float) -> None:
    """Write the line of a request. Of the path it has no query and no character that is not ASCII.

    A second line, if texts are logged, is a JSON object that begins with the same time, address and id.
    """
    path = scope["path"][:100].encode("unicode_escape").decode()
    client = (scope.get("client") or ("-",))[0]
    model = "-" if record.model is None else record.model.encode("unicode_escape").decode()
    tokens = ""
    if record.tokens_in is not None:
        tokens = f" {record.tokens_in} in ({record.cached} cached) {record.tokens_out or 0} out"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    method = scope["method"][:10]
    with suppress(OSError):  # the reader of the log went away
        note(
            f"{now} {client} {record.id} {method} {path} {record.status} {record.code} {model}{tokens} "
            f"{milliseconds:.0f} ms"
        )
        if record.texts is not None:
            texts = {"time": now, "client": client, "id": record.id, "model": record.model, **record.texts}
            note(json_bytes(texts).decode())
