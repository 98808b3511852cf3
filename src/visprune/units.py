"""Sizes: bytes of a number by its dtype, and bytes written by and for people."""

from __future__ import annotations

import re

from visprune.errors import UsageError

__all__ = ["ITEM_SIZE", "in_bytes", "read_bytes"]

ITEM_SIZE = {"float32": 4, "float16": 2}
"""Bytes of a number, by the dtype's name."""


def in_bytes(count: int) -> str:
    """Return a number of bytes in the decimal units that disks are sold by, such as "4.37 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?B|)", re.IGNORECASE | re.ASCII)


def read_bytes(option: str, text: str) -> int:
    """Return the number of bytes that a text such as "256MB" or "1.5 GB" says. Units are decimal.

    Args:
        option: Name of the option, for the message.
        text: The text. A number without a unit is a number of bytes.

    Raises:
        UsageError: The text is not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{option} {text} is not a size.", "Write it like 256MB or 1.5GB; 0 is none.")
    return int(float(found[1]) * _UNITS[found[2].upper()])
