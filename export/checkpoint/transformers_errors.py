"""Short messages for users, made of errors that transformers and its libraries raised."""

from __future__ import annotations

import textwrap

__all__ = ["hint_for", "reason_of"]


def reason_of(error: BaseException) -> str:
    """Return the reason that an error gives, in one line of at most 200 characters."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):  # its message is the key alone
        first = f"there is no {first}"
    if first.rstrip().endswith(":") and more:  # the first line only announces the reason
        first = f"{first.rstrip()} {more[0].strip()}"
    return textwrap.shorten(first, 200, placeholder=" ...")


def hint_for(error: Exception, otherwise: str) -> str:
    """Return advice on a file that transformers cannot read: for known causes, or else `otherwise`."""
    if "trust_remote_code" in str(error):
        return "Read that code, and let it run with --trust-remote-code if you trust it."
    if isinstance(error, ImportError):
        return "Install that package."
    return otherwise
