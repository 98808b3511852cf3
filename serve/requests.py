"""The reading of a request: its form, and the rules between its fields that need no model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from visprune.serve.errors import Refusal
from visprune.serve.request_errors import refusal_for
from visprune.serve.request_forms import ChatRequest

__all__ = ["read_request"]


def read_request(value: dict[str, Any], max_messages: int) -> ChatRequest:
    """Return a request after all checks that need no model.

    Args:
        value: The JSON object.
        max_messages: The most messages, which is also the most parts of a message.

    Raises:
        Refusal: 400, with the field that is at fault.
    """
    messages = value.get("messages")
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        # Before all else, so that a long list is not gone through for each of its faults.
        parts = message.get("content") if isinstance(message, dict) else None
        if place >= max_messages or (isinstance(parts, list) and len(parts) > max_messages):
            raise Refusal(
                400,
                "too_many_messages",
                f"The request has more than {max_messages} messages, or parts of a message. Send fewer.",
                "messages",
            )
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise refusal_for(error, value) from None
    _check_together(request)
    return request


def _check_together(request: ChatRequest) -> None:
    most, same = request.max_tokens, request.max_completion_tokens
    if None not in (most, same) and most != same:
        raise _contradiction(
            f"max_tokens is {most}, and max_completion_tokens {same}. Give one of them.", "max_tokens"
        )
    pruning = request.visprune
    if pruning and pruning.ratio is not None and pruning.keep_tokens is not None:
        raise _contradiction("visprune has ratio and keep_tokens. Give one of them.", "visprune.keep_tokens")
    if request.stream_options is not None and not request.stream:
        raise _contradiction(
            "stream_options are given, and stream is not true. Leave them out, or stream.", "stream_options"
        )


def _contradiction(message: str, param: str) -> Refusal:
    return Refusal(400, "invalid_value", message, param)
