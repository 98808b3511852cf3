"""Replicas of the models as a deployment of Ray Serve: started, watched, asked, and ended."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from visprune.cores import usable_cores
from visprune.errors import UnsupportedError, UsageError
from visprune.optional import require
from visprune.serve import refusals
from visprune.serve.errors import TRY_AGAIN
from visprune.serve.metrics import Metrics
from visprune.serve.options import ServeOptions
from visprune.serve.replica import Replica
from visprune.terminal import note

__all__ = ["Replicas"]

_WATCH = 1.0  # seconds between two looks at the replicas
_HEALTH = (2.0, 10.0)  # seconds between two health checks of a replica, and until one counts as failed
_GRACE = 5.0  # seconds in which a replica ends; the server has let requests finish before
_TRIES = 3  # to start a replica
_REACH = 10.0  # seconds to reach a cluster


class Replicas:
    """What `visprune.serve.model_host.ModelHost` describes, on the machines of a Ray cluster.

    Args:
        paths: Absolute directories of the bundles, the same on every machine.
        options: The options.
        metrics: Takes the figures.

    Attributes:
        failed: Error because of which no replica runs, or None.
        bug: The exception of Ray for an error in a replica's own code.
        died: The exceptions of Ray for a replica that is gone.
        patience: Seconds that a replica may take for a whole request.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: The cluster cannot be joined, or has no room for the replicas.
    """

    def __init__(self, paths: Sequence[Path], options: ServeOptions, metrics: Metrics) -> None:
        self._ray, self._serve = (
            require("ray", extra="distributed"),
            require("ray.serve", extra="distributed"),
        )
        errors = require("ray.serve.exceptions", extra="distributed")
        self.failed: BaseException | None = None
        self.bug: type[Exception] = self._ray.exceptions.RayTaskError
        self.died: tuple[type[Exception], ...] = (self._ray.exceptions.RayError, errors.RayServeException)
        self.patience = options.queue_timeout + options.request_timeout
        self._gone = (KeyError, *self.died)  # somebody has ended the deployment, or the cluster is gone
        self._paths, self._options, self._metrics = tuple(paths), options, metrics
        # One process at a time listens at an address. So what has this name was left by one that is gone.
        self._name = f"visprune-{socket.gethostname()}-{options.port or os.getpid()}"
        self._state = "loading"
        self._loaded = threading.Event()
        self._ended = threading.Event()
        self._running = 0
        self._asked = 0
        self._handle: Any = None
        # Ray takes over SIGTERM. So it is joined here, before the server sets its own handlers.
        self._ours = self._join()
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)

    @property
    def state(self) -> str:
        """State of the server; it answers requests in the state "ready"."""
        return self._state

    @property
    def active(self) -> int:
        """Number of requests that are with the replicas."""
        return self._asked

    @property
    def queued(self) -> int:
        """None: the replicas have queues of their own."""
        return 0

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that finds no place may be sent again."""
        return TRY_AGAIN

    @property
    def memory(self) -> str:
        """What to say when the replicas run."""
        return f"{self._options.replicas} replicas run."

    def start(self) -> None:
        """Begin to start the replicas."""
        self._thread.start()

    async def loaded(self) -> None:
        """Wait until all replicas run, or the server is drained or stopped."""
        await asyncio.to_thread(self._loaded.wait)
        if self.failed is not None:
            raise self.failed

    def check(self) -> None:
        """Refuse a request unless a replica runs."""
        refusals.check_state(self._state)
        if not self._running:
            raise refusals.loading()

    @asynccontextmanager
    async def ask(self, body: bytes, name: str) -> AsyncIterator[Any]:
        """Send a request to a replica. What `Replica.answer` yields is to be read in the block.

        Args:
            body: Body of the request.
            name: Its id.

        A request that is not answered to its end is cancelled. If nothing comes for `patience` seconds,
        reading raises `asyncio.TimeoutError`.
        """
        self._count(1)
        parts = self._handle.remote(body, name)
        try:
            yield _in_time(parts, self.patience)
        finally:
            parts.cancel()
            self._count(-1)

    def drain(self) -> None:
        """Accept no new requests."""
        if self._state in ("loading", "ready"):
            self._state = "draining"
            self._loaded.set()

    async def drained(self, timeout: float | None = None) -> bool:
        """Wait so many seconds until no request is with a replica; return whether there is none."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self._asked and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._asked

    def stop(self, timeout: float | None = None) -> bool:
        """End the replicas; return whether that was done within so many seconds."""
        if self._state != "failed":
            self._state = "stopped"
        self._loaded.set()
        self._ended.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _count(self, more: int) -> None:
        self._asked += more
        self._metrics.occupied(0, self._asked, 0)

    def _join(self) -> bool:
        """Join the cluster at `RAY_ADDRESS`, or that of this machine; else start one here, and return True.

        Raises:
            UsageError: The cluster at `RAY_ADDRESS` cannot be joined, or has no room for the replicas.
        """
        quiet = {"log_to_driver": False, "logging_level": "error"}
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        address = os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.rpartition(":")
        ours = False
        try:
            if host and port.isdecimal() and "/" not in host:  # Ray itself would wait minutes
                socket.create_connection((host, int(port)), timeout=_REACH).close()
            self._ray.init(address="auto", **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            if address or not isinstance(error, ConnectionError):
                said = " ".join(str(error).split()).rstrip(".")
                raise UsageError(
                    f"The Ray cluster {address} cannot be joined: {said}.",
                    "Start one with: ray start --head; or leave RAY_ADDRESS empty to use this machine alone.",
                ) from None
            self._ray.init(include_dashboard=False, **quiet)
            ours = True
        try:
            self._check_room()
        except UsageError:
            self._ray.shutdown()
            raise
        return ours

    def _check_room(self) -> None:
        cpus, gpus = self._needs
        found = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        rooms = [int(one.get("CPU", 0)) // cpus for one in found]
        if gpus:
            rooms = [min(room, int(one.get("GPU", 0))) for room, one in zip(rooms, found, strict=True)]
        if sum(rooms) < self._options.replicas:
            each = f"{cpus} processor(s)" + (" and a GPU" if gpus else "")
            raise UsageError(
                f"The Ray cluster has room for {sum(rooms)} replicas of {each}.",
                f"Ask for fewer than {self._options.replicas} --replicas, or fewer --threads for each.",
            )

    @property
    def _needs(self) -> tuple[int, int]:
        """Processors and GPUs of a replica."""
        options = self._options
        return options.threads or usable_cores(), int(options.provider != "cpu")

    # The following methods run in the thread.

    def _run(self) -> None:
        try:
            try:
                self._deploy()
                while not self._ended.wait(_WATCH):
                    self._watch()
            finally:
                self._leave()
        except BaseException as error:
            if self._state != "stopped":
                self.failed, self._state = error, "failed"
        finally:
            self._loaded.set()

    def _deploy(self) -> None:
        """Start the replicas, and wait until all run.

        Raises:
            UnsupportedError: They cannot be started.
        """
        serve, options = self._serve, self._options
        serve.start(proxy_location="Disabled")
        if self._name in serve.status().applications:
            serve.delete(self._name)
        cpus, gpus = self._needs
        deployment = serve.deployment(Replica).options(
            num_replicas=options.replicas,
            max_ongoing_requests=options.max_active + options.max_queue,
            health_check_period_s=_HEALTH[0],
            health_check_timeout_s=_HEALTH[1],
            graceful_shutdown_timeout_s=_GRACE,
            max_constructor_retry_count=_TRIES,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        )
        app = serve.RunTarget(deployment.bind(self._paths, options), name=self._name, route_prefix=None)
        (handle,) = serve.run_many([app], wait_for_applications_running=False)
        self._handle = handle.options(stream=True, method_name="answer")
        while not self._ended.wait(_WATCH):
            status = serve.status().applications[self._name]
            if status.status == "RUNNING":
                self._running = options.replicas
                if self._state == "loading":
                    self._state = "ready"
                self._loaded.set()
                return
            if status.status == "DEPLOY_FAILED":
                said = [one.message for one in status.deployments.values() if one.message] or [status.message]
                raise UnsupportedError(
                    f"The replicas cannot be started: {_last_line(said[0])}.",
                    "Each machine needs the same visprune, and the bundles at the same path.",
                )

    def _watch(self) -> None:
        """Look how many replicas run, and tell when that has changed."""
        before = self._running
        try:
            status = self._serve.status().applications[self._name].deployments["Replica"]
            self._running = status.replica_states.get("RUNNING", 0)
        except self._gone:
            self._running = 0
        if self._running != before:
            note(f"{self._running} of {self._options.replicas} replicas run.")

    def _leave(self) -> None:
        with suppress(*self._gone):
            self._serve.delete(self._name)
            if self._ours:
                self._serve.shutdown()
        self._ray.shutdown()


async def _in_time(parts: Any, seconds: float) -> AsyncIterator[Any]:
    while True:
        try:
            yield await asyncio.wait_for(anext(parts), seconds)
        except StopAsyncIteration:
            return


def _last_line(text: str) -> str:
    """Return the last line of Ray's report: the error of a replica, without the name of its class."""
    lines = text.strip().splitlines() or ["Ray does not say why"]
    return re.sub(r"^[\w.]+: ", "", lines[-1].strip()).rstrip(".")
