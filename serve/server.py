"""The server as a process: sockets, uvicorn, signals, and the order in which all of it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from visprune.errors import UsageError
from visprune.serve.app import app_over
from visprune.serve.completions import Answering, answer
from visprune.serve.options import ServeOptions
from visprune.serve.protocol import LimitedProtocol
from visprune.serve.service import Front, Service
from visprune.terminal import note

__all__ = ["listen", "serve"]

_MAX_HEAD = 32_768  # bytes of a head that has not arrived in full
_LAST_REPLIES = 5  # seconds in which replies that are complete must be taken when the server ends
_LOOK = 1.0  # seconds between looks at whether the models run
_STOP = 10.0  # seconds that the thread of the models gets to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(paths: Sequence[Path], options: ServeOptions) -> None:
    """Serve bundles until a signal comes. It returns after SIGTERM or SIGHUP.

    The first signal lets running requests finish; a second one ends the process at once.

    Raises:
        VispruneError: A bundle, the keys or an address cannot be used, or a model cannot be loaded.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    front, answering = _front(paths, options)
    sockets = listen(options.host, options.port)
    try:
        number = asyncio.run(_Process(front, answering, sockets).run())
    finally:
        for one in sockets:
            one.close()
    if not front.close():
        # A model computes or is being loaded, or a request is being prepared, which cannot be interrupted. No
        # file is left unfinished.
        os._exit(128 + number if number == signal.SIGINT else 0)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def _front(paths: Sequence[Path], options: ServeOptions) -> tuple[Front, Answering]:
    """Return a server, and what answers its requests: the models of this process, or those of replicas."""
    if options.replicas > 1:
        from visprune.serve.cluster import Cluster

        cluster = Cluster(paths, options)
        return cluster, cluster.answer
    service = Service(paths, options)
    return service, partial(answer, service)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of a host.

    Raises:
        UsageError: The port is in use, or the address is not one of this machine.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        one = socket.socket(family, kind, protocol)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # With port 0, all addresses of a name get the port that is found first.
            number = sockets[0].getsockname()[1] if sockets else port
            one.bind((address[0], number, *address[2:]))
            one.listen(128)
        except OSError as error:
            one.close()
            if error.errno == errno.EADDRNOTAVAIL and sockets:
                continue  # a name that has an address of IPv6 too, on a machine without it
            for other in sockets:
                other.close()
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"Port {port} of {host} is in use.", "Stop what uses it, or give another --port."
                ) from None
            raise UsageError(
                f"Cannot listen at {host}, port {port}: {error.strerror}.", "Give another --host or --port."
            ) from None
        sockets.append(one)
    return sockets


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end requests that are running."""

    def capture_signals(self) -> Any:
        return nullcontext()


class _Process:
    """One run of the server, from its first to its last connection.

    Args:
        front: The server.
        answering: Answers its requests.
        sockets: What it listens at.
    """

    def __init__(self, front: Front, answering: Answering, sockets: list[socket.socket]) -> None:
        self._front, self._sockets, self._options = front, sockets, front.options
        self._signal: int | None = None
        self._stop = asyncio.Event()
        config = uvicorn.Config(
            app_over(front, answering),
            http=partial(  # type: ignore[arg-type]  # a function that makes protocols
                LimitedProtocol,
                seconds=self._options.client_timeout,
                most=self._options.max_connections,
                refused=front.metrics.refused,
            ),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,  # the guard writes a line for each request, and tells of errors
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEAD,
            timeout_graceful_shutdown=_LAST_REPLIES,
        )
        self._server = _Server(config)

    async def run(self) -> int:
        """Serve, and return the number of the signal that ended it.

        Raises:
            VispruneError: A model cannot be loaded.
        """
        scheduler = self._front.scheduler
        with self._signals():
            serving = asyncio.ensure_future(self._server.serve(sockets=self._sockets))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            self._announce()
            stopped = asyncio.ensure_future(self._stop.wait())
            loading = asyncio.ensure_future(scheduler.loaded())
            failing = asyncio.ensure_future(self._failed())
            try:
                await asyncio.wait({loading, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    loading.result()
                    note(f"Ready. {scheduler.memory}")
                await asyncio.wait({stopped, serving, failing}, return_when=asyncio.FIRST_COMPLETED)
                if failing.done():
                    # Ended, the server can be started again by what watches it.
                    raise RuntimeError("The models do not run any more.")
                await self._drain()
            finally:
                self._server.should_exit = True
                stopped.cancel()
                failing.cancel()
                await asyncio.gather(serving, loading, stopped, failing, return_exceptions=True)
        return self._signal or signal.SIGTERM

    async def _failed(self) -> None:
        """Wait until the models do not run any more, because of a bug."""
        while self._front.scheduler.state != "failed":
            await asyncio.sleep(_LOOK)

    async def _drain(self) -> None:
        """Let running requests finish. Those that do not in time are told so, at their next token."""
        scheduler = self._front.scheduler
        running = scheduler.active + scheduler.queued
        scheduler.drain()
        if running:
            requests = "1 request" if running == 1 else f"{running} requests"
            with suppress(OSError):  # whoever read the log may be gone
                note(f"Finishing {requests}. Another signal ends the server at once.")
        await scheduler.drained(self._options.drain_timeout)
        await asyncio.to_thread(scheduler.stop, _STOP)

    def _announce(self) -> None:
        host, port = self._options.host, self._sockets[0].getsockname()[1]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        note(f"page: {address}/\nAPI:  {address}/v1\ndocs: {address}/docs")
        if self._options.no_auth:
            note("Everyone who reaches this address may ask: there are no keys.")
        note(f"Loading {', '.join(self._front.cards)} ...")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def take(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                with suppress(OSError):
                    os.write(2, b"Stopped at once.\n")
                os._exit(128 + number)
            self._signal = number
            loop.call_soon_threadsafe(self._stop.set)

        ours = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]  # as under nohup
        before = {one: signal.signal(one, take) for one in ours}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
