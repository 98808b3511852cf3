"""The refusal of a request, in the form of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from visprune.errors import InputError, MemoryShortageError, UnsupportedError, UsageError, VispruneError

__all__ = ["TRY_AGAIN", "Refusal", "refusal_of"]

TRY_AGAIN = 5
"""Seconds after which a server that loads, restarts or lacks memory may be ready."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


@dataclass  # not frozen: Python sets the traceback of an exception
class Refusal(Exception):  # noqa: N818 - the word that the API's documentation uses
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        code: Short name of the cause, such as "queue_full". The metrics count refusals by it.
        message: A sentence that says what is wrong, and one that says what to do.
        param: Field of the request that is at fault, such as "messages[0].content", or None.
        retry_after: Seconds after which to try again, for the header Retry-After; None for no header.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON object of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: VispruneError, param: str | None = None) -> Refusal:
    """Return the refusal for an error of the runtime.

    An error in what the client sent has the status 400. If memory is short, the client may try again: 503.
    Others are the server's own: 500.
    """
    if isinstance(error, MemoryShortageError):
        return Refusal(503, "out_of_memory", str(error), param, retry_after=TRY_AGAIN)
    mine = isinstance(error, (InputError, UsageError, UnsupportedError))
    return Refusal(400 if mine else 500, "invalid_request" if mine else "model_failed", str(error), param)
