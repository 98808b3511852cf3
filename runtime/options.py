"""Keyword options of `generate`, `stream` and `chat`, each with its type.

The docstring of `Pipeline.stream` explains them. The options are a dictionary only on the way from a call to
`Pipeline.chat` and `Chat.stream`, which read them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict, cast

from visprune.runtime.sampling import Sampling
from visprune.runtime.structured import JsonSchema

__all__ = ["AnswerOptions", "ChatOptions", "PromptOptions", "check_names", "split_options"]


class ChatOptions(TypedDict, total=False):
    """Options of a conversation."""

    system: str | None
    ratio: float | None
    keep_tokens: int | None


class AnswerOptions(TypedDict, total=False):
    """Options of one answer."""

    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    schema: JsonSchema | None


class PromptOptions(ChatOptions, AnswerOptions, total=False):
    """Options of one answer in a new conversation."""


def split_options(options: PromptOptions) -> tuple[ChatOptions, AnswerOptions]:
    """Return the options of the conversation and those of the answer."""
    of_chat = {name: value for name, value in options.items() if name in ChatOptions.__optional_keys__}
    of_answer = {name: value for name, value in options.items() if name not in of_chat}
    return cast(ChatOptions, of_chat), cast(AnswerOptions, of_answer)


def check_names(function: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse an unknown keyword, as Python does for a function that lists its keywords.

    Args:
        function: Name of the function that was called, for the message.
        names: Keywords of the call.
        known: Keywords that the function takes.

    Raises:
        TypeError: A keyword is unknown.
    """
    for name in names:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
