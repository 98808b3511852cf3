"""Caches under `~/.cache/visprune`: results that can be computed again, and may be removed at any time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from visprune.staging import whole

__all__ = ["cache_dir", "keep"]


def cache_dir(name: str = "") -> Path:
    """Return the directory of one cache, or of all: `$XDG_CACHE_HOME/visprune` or `~/.cache/visprune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    if base and Path(base).is_absolute():
        return Path(base) / "visprune" / name
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises without one
    return Path(home) / ".cache" / "visprune" / name


def keep(entry: Path, write: Callable[[Path], object]) -> None:
    """Write a cache entry whole, or not at all.

    Where the cache cannot be written, nothing happens: the result is computed again next time.

    Args:
        entry: The file to make.
        write: Called with a temporary path beside it, with the same suffix.
    """
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with whole(entry) as temporary:
            write(temporary)
