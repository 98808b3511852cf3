"""Checks of a request before its body is read, and the reading of the body within its limits."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from visprune.serve import refusals
from visprune.serve.errors import Refusal
from visprune.serve.options import ServeOptions, is_loopback
from visprune.units import in_bytes

__all__ = ["Hosts", "Receive", "check_head", "check_site", "first_headers", "read_body"]

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
"""How an ASGI application gets the parts of a request."""

_MAX_HEADERS = 100
_MAX_HEAD = 32_768  # bytes of all headers and the path


def first_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the headers of a request by their names in lower case; of several, the first."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found.setdefault(name.lower(), value)
    return found


def check_head(headers: list[tuple[bytes, bytes]], path: bytes) -> None:
    """Refuse a head that is too long, or has a header twice that must be there once.

    Raises:
        Refusal: 431 or 400.
    """
    size = len(path) + sum(len(name) + len(value) for name, value in headers)
    if len(headers) > _MAX_HEADERS or size > _MAX_HEAD:
        raise Refusal(
            431,
            "headers_too_large",
            f"The request has {len(headers)} headers of {size:,} bytes; {_MAX_HEADERS} headers of "
            f"{_MAX_HEAD:,} bytes are taken. Send fewer.",
        )
    names = [name.lower() for name, _ in headers]
    if any(names.count(name) > 1 for name in (b"authorization", b"host", b"origin")):
        raise Refusal(400, "invalid_headers", "A header occurs twice. Send it once.")


@dataclass(frozen=True, slots=True)
class Hosts:
    """Names by which browsers may call the server.

    A page of another site can give its own name this machine's address (DNS rebinding), and would then be of
    the server's origin. The header Host tells, because it has that page's name. An address in Host is
    harmless: nobody can rebind it.

    Attributes:
        names: Names in lower case; None takes every name.
    """

    names: frozenset[str] | None

    @classmethod
    def of(cls, options: ServeOptions, *, have_keys: bool) -> Hosts:
        """Return the names that are taken: every one where keys protect a server that others can reach."""
        given = [name.lower() for name in options.allow_host or ()]
        local = is_loopback(options.host)
        if have_keys and not local and not given:
            return cls(None)
        machine = socket.gethostname().lower()
        own = [] if local else [machine, f"{machine}.local"]
        return cls(frozenset({"localhost", *given, *own}))

    def check(self, host: bytes | None) -> None:
        """Refuse a name that is not one of the server's.

        Raises:
            Refusal: 421.
        """
        if host is None or self.names is None:  # no browser leaves the header out
            return
        name = _name_of(host)
        if name in self.names or name.endswith(".localhost") or _is_address(name):
            return
        raise Refusal(
            421,
            "host_not_allowed",
            "This server is not called by the name in the header Host. Use its address, or start it with "
            "--allow-host and the name.",
        )


def check_site(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a request that a page of another site makes in somebody's browser.

    Programs send neither header. A browser sends Sec-Fetch-Site where the connection is secure or local, and
    Origin with every POST; no page can change them.

    Raises:
        Refusal: 403.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        own = site in (b"same-origin", b"none")
    else:
        own = origin is None or origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
    if not own:
        raise Refusal(
            403,
            "cross_site",
            "A page of another site may not use this server. Call it from a program, or from its own page.",
        )


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int, seconds: float
) -> bytes:
    """Return the body of a request in JSON.

    Args:
        headers: Headers of the request.
        receive: Gives the parts of the body.
        max_bytes: The largest body.
        seconds: Time in which all of it must arrive.

    Raises:
        Refusal: 415, it is no JSON or is compressed; 413, it is too large, which is told before anything is
            read if its length is announced; 408, it does not arrive in time; 499, the client is gone.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" or headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(
            415,
            "unsupported_media_type",
            "The request is not plain JSON. Send it with the header Content-Type: application/json, and not "
            "compressed.",
        )
    too_large = Refusal(
        413,
        "request_too_large",
        f"The request is larger than {in_bytes(max_bytes)}. Send smaller pictures: the model sees a few "
        "hundred pixels a side anyway.",
    )
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit() or int(announced[:20]) > max_bytes:
        raise too_large
    body, end, more = bytearray(), monotonic() + seconds, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), end - monotonic())
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                "body_timeout",
                f"The request did not arrive within {seconds:g} seconds. Send it at once.",
            ) from None
        if message["type"] != "http.request":
            raise refusals.cancelled("client_gone")
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large
        more = message.get("more_body", False)
    return bytes(body)


def _name_of(host: bytes) -> str:
    """Return the name or address in a header Host, without its port."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        name, _, port = text[1:].partition("]")
        return name if not port or port[0] == ":" else text
    return text.rpartition(":")[0] or text if text.count(":") == 1 else text


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
