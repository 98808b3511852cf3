"""Look-up of a name in a table; the nearest known name is suggested for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from visprune.errors import UsageError

__all__ = ["lookup", "nearest"]

T = TypeVar("T")


def lookup(name: str, table: Mapping[str, T], kind: str) -> T:
    """Return the entry of a name.

    Args:
        name: As the user wrote it.
        table: Entries by their names.
        kind: What the names stand for, in messages.

    Raises:
        UsageError: The table has no such name. The hint suggests the nearest one, or lists all.
    """
    if name in table:
        return table[name]
    close = nearest(name, table)
    hint = f"Did you mean {close!r}?" if close else f"Use one of: {', '.join(table)}."
    raise UsageError(f"There is no {kind} {name!r}.", hint)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like this one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)), None)
