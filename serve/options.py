"""Options of the server, with their checks."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from visprune.backend_choice import BackendChoice
from visprune.errors import UsageError
from visprune.options import Option, documented
from visprune.units import read_bytes

__all__ = ["ServeOptions", "is_loopback"]

_MOST_PIXELS = 89_478_485  # `visprune.runtime.vision.images.MAX_PIXELS`, which takes Pillow to import
_MAX_WAIT = 7 * 24 * 3600.0  # seconds; a longer limit is a mistake


@documented
@dataclass(frozen=True, slots=True)
class ServeOptions(BackendChoice):
    """Options of the server. Sizes are texts such as "256MB"; `size` returns one in bytes.

    Raises:
        UsageError: A value is out of its range or not a size, or two options exclude each other.
    """

    host: Annotated[
        str, Option("Address to listen at. Beyond this machine, keys are needed.", metavar="ADDRESS")
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen at; 0 takes a free one.")] = 8000
    api_key_file: Annotated[
        Path | None, Option("File of keys, one a line. Clients must send one of them.", metavar="FILE")
    ] = None
    no_auth: Annotated[bool, Option("Let anyone who reaches the address ask, without a key.")] = False
    allow_host: Annotated[
        list[str] | None,
        Option(
            "Name by which browsers may call this server, such as that of a reverse proxy; may be repeated.",
            metavar="NAME",
        ),
    ] = None
    allow_url: Annotated[
        list[str] | None,
        Option(
            "Host from which pictures may be fetched, HOST or HOST:PORT; may be repeated.", metavar="HOST"
        ),
    ] = None
    replicas: Annotated[
        int, Option("Copies of the models, on the machines of a Ray cluster; 1 is this process alone.")
    ] = 1
    max_active: Annotated[int, Option("The most requests that are computed in turn.")] = 4
    max_queue: Annotated[int, Option("The most requests that wait; others are refused.")] = 16
    queue_timeout: Annotated[float, Option("Seconds that a request may wait.", metavar="SECONDS")] = 60.0
    request_timeout: Annotated[float, Option("Seconds that a request may take.", metavar="SECONDS")] = 300.0
    client_timeout: Annotated[
        float,
        Option(
            "Seconds in which a client must send its request, and take what it is sent.", metavar="SECONDS"
        ),
    ] = 30.0
    drain_timeout: Annotated[
        float, Option("Seconds that running requests have to finish after SIGTERM.", metavar="SECONDS")
    ] = 30.0
    max_tokens: Annotated[
        int, Option("The most tokens of an answer, and how many if the request does not say.")
    ] = 512
    memory: Annotated[
        str | None, Option("Memory of active conversations.", metavar="SIZE", shows="measured at the start")
    ] = None
    picture_cache: Annotated[
        str,
        Option("Memory for features of pictures that were asked about before; 0 is none.", metavar="SIZE"),
    ] = "256MB"
    prefix_cache: Annotated[
        str, Option("Memory for conversations that may be continued; 0 is none.", metavar="SIZE")
    ] = "256MB"
    max_body: Annotated[
        str, Option("The largest request, and the largest picture fetched.", metavar="SIZE")
    ] = "20MB"
    max_images: Annotated[int, Option("The most pictures of a request.")] = 8
    max_pixels: Annotated[int, Option("The most pixels of a request's pictures together.")] = 40_000_000
    max_messages: Annotated[int, Option("The most messages of a request.")] = 256
    max_connections: Annotated[int, Option("The most connections at once.")] = 256
    log_prompts: Annotated[
        bool, Option("Log what is asked and answered, too. Pictures and keys are never logged.")
    ] = False

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("memory", "picture_cache", "prefix_cache", "max_body"):
            needed = getattr(self, name) is not None and "cache" not in name
            if self.size(name) == 0 and needed:
                raise UsageError(f"{_flag(name)} is 0, so that no request fits.", "Give a size such as 20MB.")
        if self.no_auth and self.api_key_file is not None:
            raise UsageError("Both --no-auth and --api-key-file were given.", "Give one of them.")
        if self.api_key_file is None and not self.no_auth and not is_loopback(self.host):
            raise UsageError(
                f"The address {self.host} can be reached from other machines, and there are no keys.",
                "Give a file of keys with --api-key-file, or say --no-auth to let everyone in.",
            )
        for name in (*(self.allow_host or ()), *(self.allow_url or ())):
            if not name.isascii() or not name or any(sign in name for sign in "/@?# \\"):
                raise UsageError(
                    f"{name!r} is not the name of a host.", "Give a name such as photos.example.com."
                )

    def _check_numbers(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"There is no port {self.port}.", "Give one from 0 (any that is free) to 65535.")
        for name, smallest in _LEAST.items():
            if getattr(self, name) < smallest:
                raise UsageError(
                    f"{_flag(name)} is {getattr(self, name)}.", f"Give a number of at least {smallest}."
                )
        if self.max_pixels > _MOST_PIXELS:
            raise UsageError(
                f"--max-pixels is {self.max_pixels}.",
                f"Give a number of at most {_MOST_PIXELS}: the runtime's own.",
            )
        for name in ("queue_timeout", "request_timeout", "client_timeout", "drain_timeout"):
            seconds = getattr(self, name)
            too_short = seconds == 0 and name != "drain_timeout"
            if too_short or not 0 <= seconds <= _MAX_WAIT:  # NaN fails too
                raise UsageError(f"{_flag(name)} is {seconds:g}.", "Give a number of seconds, such as 60.")

    def size(self, name: str) -> int:
        """Return the number of bytes of an option that is a size; 0 if it is None.

        Raises:
            UsageError: The text is not a size.
        """
        text = getattr(self, name)
        return 0 if text is None else read_bytes(_flag(name), text)


_LEAST = {
    "replicas": 1,
    "max_active": 1,
    "max_queue": 0,
    "max_tokens": 1,
    "max_images": 0,
    "max_pixels": 1,
    "max_messages": 1,
    "max_connections": 1,
}


def is_loopback(host: str) -> bool:
    """Return whether an address, or every address of a name, is one of this machine alone.

    Raises:
        UsageError: The name has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UsageError(
            f"There is no address {host!r}.", "Give one of this machine, such as 0.0.0.0."
        ) from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return all((getattr(one, "ipv4_mapped", None) or one).is_loopback for one in addresses)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
