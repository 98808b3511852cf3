"""Alters JSON and bytes at random, as damage, editing by hand and malice do."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["alter_bytes", "alter_json", "alter_text"]

# What a field may hold that should hold something else.
_ODD: tuple[Any, ...] = (
    *(None, True, False, "", [], {}, [[]], [None], {"": None}, -1, 0, 1, 2, 3, 7, 255, 65536, 2**31, 2**32),
    *(2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.0, -0.0, 0.5, 1e-320, 1e308, float("nan")),
    *(float("inf"), "x", "x" * 5000, "\ud800", "\0", "../x", "/etc/passwd", "http://host/a.png", "float16"),
    *("int64", "data:image/png;base64,AAAA", "<image>", "é\u200b", "{{ 1/0 }}", "{% for x in y %}"),
)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of parsed JSON."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


def alter_json(data: Any, draw: random.Random) -> Any:
    """A copy of parsed JSON with one to three changes."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(_places(data))
        if not found:
            return draw.choice(_ODD)
        holder, key = draw.choice(found) if draw.random() < 0.5 else _descended(data, draw)
        _alter_place(holder, key, found, draw)
    return data


def _descended(data: Any, draw: random.Random) -> tuple[Any, Any]:
    """A place found from the top, so that long lists are not altered more often than single fields."""
    key = draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
    inner = data[key]
    if isinstance(inner, (dict, list)) and inner and draw.random() < 0.9:
        return _descended(inner, draw)
    return data, key


def _alter_place(holder: Any, key: Any, found: list[tuple[Any, Any]], draw: random.Random) -> None:
    value, what = holder[key], draw.randrange(8)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[key + draw.choice(("x", "", "_", "\0"))] = holder.pop(key)
    elif what == 1:
        holder.insert(key, copy.deepcopy(value))
    elif what == 2:
        other, there = draw.choice(found)
        if there in other if isinstance(other, dict) else there < len(other):
            holder[key] = copy.deepcopy(other[there])
    elif what <= 4 and isinstance(value, (int, float)) and abs(value) < 1e300:
        holder[key] = draw.choice(
            (value + 1, value - 1, value * 2, value * 100, -value, float(value), str(value))
        )
    elif what <= 4 and isinstance(value, str) and value:
        at = draw.randrange(len(value))
        holder[key] = draw.choice(
            (value[:at], value[at:], value + value, value[:at] + "\0" + value[at:], value.upper())
        )
    else:
        holder[key] = copy.deepcopy(draw.choice(_ODD))


def alter_bytes(content: bytes, draw: random.Random) -> bytes:
    """A copy of bytes with some flipped, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        if not data:
            break
        # Files tell at their beginning what they hold.
        at = draw.randrange(len(data) if draw.random() < 0.5 else min(len(data), 120))
        length = draw.choice((1, 1, 2, 4, 16, 100))
        what = draw.randrange(6)
        if what == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            data[at] = draw.choice((0, 1, 127, 128, 255))
        elif what == 2:
            del data[at : at + length]
        elif what == 3:
            data[at:at] = data[at : at + length]
        elif what == 4:
            data[at : at + length] = draw.randbytes(length)
        else:
            del data[at:]
    return bytes(data)


def alter_text(text: str, draw: random.Random) -> bytes:
    """JSON altered as JSON for the most part, and else as bytes."""
    if draw.random() < 0.15:
        return alter_bytes(text.encode(), draw)
    return json.dumps(alter_json(json.loads(text), draw)).encode()
