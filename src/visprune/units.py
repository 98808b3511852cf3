"""Sizes: bytes of a number by its dtype, and bytes written for people."""

from __future__ import annotations

__all__ = ["ITEM_SIZE", "in_bytes"]

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
