"""The interface between the server and what runs its models: the scheduler of this process, or replicas."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ModelHost"]


class ModelHost(Protocol):
    """What runs the models."""

    @property
    def state(self) -> str:
        """State of the server; it answers requests in the state "ready"."""

    @property
    def active(self) -> int:
        """Number of requests that are being computed."""

    @property
    def queued(self) -> int:
        """Number of requests that wait."""

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that finds no place may be sent again."""

    @property
    def memory(self) -> object:
        """What to say when the models are loaded."""

    def start(self) -> None:
        """Begin to load the models. Call it once."""

    async def loaded(self) -> None:
        """Wait until the models are loaded, or the server is drained or stopped.

        Raises:
            VispruneError: A model cannot be loaded.
        """

    def check(self) -> None:
        """Refuse a request unless the server is ready.

        Raises:
            Refusal: Requests are not accepted yet or any more.
        """

    def drain(self) -> None:
        """Accept no new requests. Those that are active and queued go on."""

    async def drained(self, timeout: float | None = None) -> bool:
        """Wait so many seconds until no request is active or queued; return whether there is none."""

    def stop(self, timeout: float | None = None) -> bool:
        """End all requests and free the models; return whether that was done within so many seconds."""
