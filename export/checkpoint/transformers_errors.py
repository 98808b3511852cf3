"""What to tell a user of an error that transformers raised."""

from __future__ import annotations

import textwrap

__all__ = ["first_line", "hint"]


def first_line(error: BaseException) -> str:
    """What a library says, cut where it begins to list everything it knows."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):  # which says no more than the key
        first = f"there is no {first}"
    if first.rstrip().endswith(":") and more:  # what was announced is what is wrong
        first = f"{first.rstrip()} {more[0].strip()}"
    return textwrap.shorten(first, 200, placeholder=" ...")


def hint(error: Exception, otherwise: str) -> str:
    """What to do about a file that transformers cannot read."""
    if "trust_remote_code" in str(error):
        return "Read that code, and let it run with --trust-remote-code if you trust it."
    if isinstance(error, ImportError):
        return "Install that package."
    return otherwise
