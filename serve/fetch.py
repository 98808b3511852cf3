"""Pictures from the web, of hosts that the operator named. No client can make the server call another one.

A name is resolved once, every address it has must be a public one, and the connection goes to exactly the
address that was checked, so a name server cannot answer differently the second time. Redirects are followed
under the same rules.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from visprune.errors import InputError
from visprune.units import in_bytes
from visprune.version import __version__

__all__ = ["Fetcher", "is_public"]

_MAX_REDIRECTS = 3
_MAX_URL = 2048
_SECONDS = 10.0  # for one picture, redirects included
_SEND = "Send the picture as a data: URL."
_SEND_OR_ALLOW = "Send the picture as a data: URL, or have its host allowed with --allow-url."
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
# Addresses of IPv6 that stand for addresses of IPv4, which may be private ones.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a host of the internet: not to this machine or its network."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped is not None
        or address.sixtofour is not None
        or address.teredo is not None
        or address.is_site_local
        or any(address in network for network in _TRANSLATED)
    ):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches files from named hosts.

    Attributes:
        hosts: Names, each with a port after a colon if it is not that of the scheme.
        max_bytes: The largest file.
        seconds: Time for one file.
        allowed: Says whether an address may be connected to.
    """

    hosts: frozenset[str]
    max_bytes: int
    seconds: float = _SECONDS
    allowed: Callable[[Address], bool] = field(default=is_public)

    @classmethod
    def of(cls, hosts: Iterable[str], max_bytes: int) -> Fetcher:
        """Return a fetcher for hosts as the command line names them."""
        return cls(frozenset(host.lower() for host in hosts), max_bytes)

    def fetch(self, url: str) -> bytes:
        """Return the content of a URL.

        Raises:
            InputError: The URL or one it leads to is not allowed, cannot be had, is too large or too slow.
        """
        end = monotonic() + self.seconds
        for _ in range(_MAX_REDIRECTS + 1):
            found = self._get(self._checked(url), end)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise InputError(
            f"The picture's URL leads from one to the next more than {_MAX_REDIRECTS} times.",
            "Give the last of them, or send the picture as a data: URL.",
        )

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        fine = len(url) <= _MAX_URL and url.isascii() and url.isprintable() and " " not in url
        if not fine or parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
            raise _failed("The picture's URL cannot be used.")
        host = parts.hostname.rstrip(".")
        names = {f"{host}:{port or _PORTS[parts.scheme]}"}
        if port in (None, _PORTS[parts.scheme]):
            names.add(host)
        if not names & self.hosts:
            what = f"Pictures are not fetched from {host}{f':{port}' if port else ''}."
            raise InputError(what, _SEND if self._is_private(host) else _SEND_OR_ALLOW)
        return parts

    def _is_private(self, host: str) -> bool:
        """Return whether a host is this machine, or an address that may not be connected to."""
        try:
            return not self.allowed(ipaddress.ip_address(host))
        except ValueError:
            return host == "localhost"

    def _get(self, parts: SplitResult, end: float) -> bytes | str:
        """Return the content of a URL, or where it leads."""
        left = end - monotonic()
        host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
        address = self._resolve(host, port)
        try:
            with closing(_Connection(parts.scheme, host, port, address, max(left, 0.001))) as connection:
                # Each read has a limit of its own, so a slow host could take any time. This ends all of them.
                timer = threading.Timer(max(left, 0.001), connection.abort)
                timer.daemon = True
                timer.start()
                try:
                    return self._ask(connection, parts)
                finally:
                    timer.cancel()
        except (OSError, http.client.HTTPException, ValueError):
            # The reason is not told: it would say which ports of a host are open.
            raise _failed(f"The picture cannot be fetched from {host}.") from None

    def _ask(self, connection: _Connection, parts: SplitResult) -> bytes | str:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"visprune/{__version__}",
        }
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        place = answer.getheader("Location")
        if answer.status in _REDIRECTS and place:
            return place
        if answer.status != 200:
            raise _failed(f"The host of the picture answers with the status {answer.status}.")
        content = answer.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise InputError(
                f"The picture at {parts.hostname} is larger than {in_bytes(self.max_bytes)}.",
                "Scale it down first.",
            )
        if answer.length:  # it was cut short
            raise OSError
        return content

    def _resolve(self, host: str, port: int) -> str:
        """Return the first address of a host, after all of them were checked."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _failed(f"The host {host} of the picture is not known.") from None
        texts = [str(entry[4][0]) for entry in found]
        # One with a zone, such as fe80::1%eth0, is local.
        if any("%" in text or not self.allowed(ipaddress.ip_address(text)) for text in texts):
            raise InputError(f"The host {host} of the picture has an address that is not public.", _SEND)
        return texts[0]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name of its host."""

    def __init__(self, scheme: str, host: str, port: int, address: str, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self.default_port = _PORTS[scheme]  # so that the header Host has no port where none is needed
        self._address, self._secure = address, scheme == "https"
        self._plain: socket.socket | None = None

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self._plain = plain
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
            self._plain = self.sock
        else:
            self.sock = plain

    def abort(self) -> None:
        """End every read and write."""
        if self._plain is not None:
            with suppress(OSError):
                self._plain.shutdown(socket.SHUT_RDWR)


def _failed(what: str) -> InputError:
    return InputError(what, "Check the URL, or send the picture as a data: URL.")
