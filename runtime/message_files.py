"""Files of messages: a JSON list in the form of OpenAI's API, whose images may be paths too.

    [{"role": "system", "content": "Answer in one word."},
     {"role": "user", "content": [{"type": "text", "text": "What is in"},
                                  {"type": "image_url", "image_url": {"url": "cat.png"}},
                                  {"type": "text", "text": "?"}]},
     {"role": "assistant", "content": "It is a"}]

A path is relative to the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visprune.errors import InputError, UsageError
from visprune.runtime.messages import Message
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.sources import locate

__all__ = ["read_messages"]

_FORM = (
    'Write a list of {"role": ..., "content": ...}; a content is a text, or a list of {"type": "text", '
    '"text": ...} and {"type": "image_url", "image_url": {"url": PATH or data: URL}}.'
)


def read_messages(file: Path) -> list[Message]:
    """Read the messages of a file. Images are decoded.

    Raises:
        UsageError: The file cannot be read.
        InputError: It is not JSON, a message has another form, or an image cannot be read.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"The messages {file} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not JSON.", _FORM) from None
    if not isinstance(data, list) or not data:
        raise InputError(f"{file} is no list of messages.", _FORM)
    return [_message(one, file.parent, f"Message {number} of {file}") for number, one in enumerate(data, 1)]


def _message(data: Any, folder: Path, where: str) -> Message:
    role, content = _fields(data, ("role", "content"), where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(role, str) or not isinstance(content, list):
        raise InputError(f"{where} has another form.", _FORM)
    role = "system" if role == "developer" else role  # as OpenAI's API calls it for newer models
    try:
        return Message(role, [_part(part, folder, where) for part in content])
    except InputError as error:
        what = error.what if error.what.startswith(where) else f"{where}: {error.what}"
        raise InputError(what, error.hint) from None


def _part(data: Any, folder: Path, where: str) -> Any:
    kind = data.get("type") if isinstance(data, dict) else None
    if kind == "text":
        text = _fields(data, ("type", "text"), where)[1]
        if isinstance(text, str):
            return text
    if kind == "image_url":
        image_url = _fields(data, ("type", "image_url"), where)[1]
        if isinstance(image_url, dict) and image_url.get("detail") in ("auto", None):
            image_url = {name: value for name, value in image_url.items() if name != "detail"}
        (url,) = _fields(image_url, ("url",), where)
        if isinstance(url, str) and url.strip():
            image = locate(url)
            return decode(image if isinstance(image, bytes) else folder / image)
    raise InputError(f"a part {str(data)[:80]} has another form.", _FORM)


def _fields(data: Any, names: tuple[str, ...], where: str) -> list[Any]:
    """Return the values of an object that has exactly these fields."""
    if not isinstance(data, dict) or set(data) != set(names):
        raise InputError(f"{where} has a part that is no object of {' and '.join(names)}.", _FORM)
    return [data[name] for name in names]
