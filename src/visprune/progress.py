"""Progress of long work: one callback type for every step of every command."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and its total."""


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""
