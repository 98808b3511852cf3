"""The body of a request as JSON: bounded in nesting and in parts before Python makes objects of it."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from visprune.serve.errors import Refusal

__all__ = ["MAX_NESTING", "read_json"]

MAX_NESTING = 32
"""The most lists and objects inside each other. A JSON schema in a request may need a dozen."""

# A part such as {} takes 3 bytes in a body, and about 70 in memory.
_MAX_MARKS = 250_000
_MARKS = (b",", b"[", b"{", b'"', b"\\")
_MARK = re.compile(rb'[\\"\[\]{}]')


def read_json(body: bytes) -> dict[str, Any]:
    """Return the object in a body. Where a name occurs twice, the last one counts.

    Raises:
        Refusal: 400, the body is not a JSON object in UTF-8, is nested too deeply, or has too many parts.
    """
    if sum(body.count(mark) for mark in _MARKS) > _MAX_MARKS:
        raise _bad(f"The request has more than {_MAX_MARKS:,} parts.", "Send fewer or shorter messages.")
    if _nesting(body) > MAX_NESTING:
        raise _bad(f"The request is nested more than {MAX_NESTING} levels deep.", "Send a flatter one.")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise _bad("The request is not UTF-8.", "Send JSON in UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _bad(
            f"The request is not JSON: {error.msg} at character {error.pos}.", "Send a JSON object."
        ) from None
    except ValueError:  # a whole number of more than 4,300 digits, or NaN
        raise _bad("The request has a number that is not finite, or too long.", "Send another.") from None
    if not isinstance(value, dict):
        raise _bad("The request is JSON, and not an object.", "Send a JSON object.")
    return value


def _nesting(body: bytes) -> int:
    """Return the greatest number of brackets that are open at once, outside of strings."""
    depth = deepest = 0
    quoted, escaped = False, -1
    for found in _MARK.finditer(body):
        mark, place = found[0], found.start()
        if place == escaped:
            continue
        if mark == b"\\":
            escaped = place + 1
        elif mark == b'"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if mark in b"[{" else -1
            deepest = max(deepest, depth)
    return deepest


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _bad(what: str, hint: str) -> Refusal:
    return Refusal(400, "invalid_json", f"{what} {hint}")
