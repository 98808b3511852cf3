"""A name out of a table, or what was meant by it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from visprune.errors import UsageError

__all__ = ["named"]

T = TypeVar("T")


def named(name: str, table: Mapping[str, T], kind: str) -> T:
    """The entry of a name.

    Raises:
        UsageError: There is none; a name like it is offered.
    """
    if name not in table:
        close = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(table)}."
        raise UsageError(f"There is no {kind} {name!r}.", hint)
    return table[name]
