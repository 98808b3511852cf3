"""The refusals that come from running the models, in words."""

from __future__ import annotations

from collections.abc import Sequence

from visprune.serve.errors import TRY_AGAIN, Refusal
from visprune.units import in_bytes

__all__ = [
    "cancelled",
    "check_state",
    "draining",
    "internal_error",
    "loading",
    "model_not_found",
    "not_running",
    "queue_full",
    "queue_timeout",
    "replica_died",
    "request_timeout",
    "too_large",
]

_SHOWN = 100  # the most characters of a name in a message


def model_not_found(name: str, served: Sequence[str]) -> Refusal:
    """Return the refusal of a model that is not served."""
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    message = f"There is no model {shown!r}. Ask for one of: {', '.join(served)}."
    return Refusal(404, "model_not_found", message, "model")


def loading() -> Refusal:
    """Return the refusal of a request that comes before the models are loaded."""
    message = "The models are being loaded. Try again in a few seconds."
    return Refusal(503, "loading", message, retry_after=TRY_AGAIN)


def check_state(state: str) -> None:
    """Refuse a request in any state of the server but "ready".

    Raises:
        Refusal: Requests are not accepted yet or any more.
    """
    if state == "loading":
        raise loading()
    if state == "failed":
        raise not_running()
    if state != "ready":
        raise draining()


def draining() -> Refusal:
    """Return the refusal of a request that comes, or is not answered, when the server shuts down."""
    message = "The server is shutting down. Try again in a few seconds."
    return Refusal(503, "draining", message, retry_after=TRY_AGAIN)


def not_running() -> Refusal:
    """Return the refusal of requests after loading failed."""
    return Refusal(503, "not_running", "The models do not run. See the server's messages, and restart it.")


def queue_full(waiting: int, retry_after: int) -> Refusal:
    """Return the refusal of a request for which the queue has no place."""
    message = f"The server's queue is full, and {waiting} wait in it. Try again later."
    return Refusal(429, "queue_full", message, retry_after=retry_after)


def too_large(tokens: int, needed: int, bound: int) -> Refusal:
    """Return the refusal of a conversation that needs more bytes than all conversations may take."""
    message = (
        f"A conversation of up to {tokens} tokens needs {in_bytes(needed)} of memory, and the server has "
        f"{in_bytes(bound)} for all of them. Shorten the messages, keep fewer visual tokens, or ask for "
        "fewer new tokens (max_completion_tokens)."
    )
    return Refusal(400, "context_too_large_for_memory", message)


def queue_timeout(seconds: float, retry_after: int) -> Refusal:
    """Return the refusal of a request that waited for its place for too long."""
    message = f"The request waited {seconds:g} seconds while others were answered. Try again later."
    return Refusal(503, "queue_timeout", message, retry_after=retry_after)


def request_timeout(seconds: float) -> Refusal:
    """Return the refusal of a request whose answer takes too long."""
    message = (
        f"The answer was not complete after {seconds:g} seconds. Ask for fewer new tokens "
        "(max_completion_tokens), or try again when the server is less busy."
    )
    return Refusal(504, "request_timeout", message)


def replica_died() -> Refusal:
    """Return the refusal of a request that was with a replica when it died."""
    message = (
        "The process that computed this answer died, and another takes its place. Send the request again."
    )
    return Refusal(503, "replica_died", message, retry_after=1)


def cancelled(cause: str) -> Refusal:
    """Return the end of a request whose client is gone. 499 is the status that nginx logs for it."""
    return Refusal(499, cause, "The request was cancelled. Send it again.")


def internal_error() -> Refusal:
    """Return the refusal of a request at which the server failed. It tells nothing of the error."""
    message = "The server failed at this request. Tell its operator, who finds more in the server's messages."
    return Refusal(500, "internal_error", message)
