"""Remembers which files of a bundle were hashed, so that only the first load of large weights is slow.

A file counts as verified while its path, size and time of change are those of the last good hash. That
guards against damaged copies and interrupted downloads, not against somebody who can set file times.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from visprune.bundle import Bundle

__all__ = ["cache_dir", "verify"]


def cache_dir() -> Path:
    """Where visprune keeps what it can make again: `$XDG_CACHE_HOME/visprune` or `~/.cache/visprune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    if base and Path(base).is_absolute():
        return Path(base) / "visprune"
    return Path(os.path.expanduser("~")) / ".cache" / "visprune"  # noqa: PTH111 - Path.home() raises without one


def verify(bundle: Bundle, on_file: Callable[[str, int], None] | None = None) -> int:
    """Check the files of a bundle against its manifest, skipping those known to be good.

    Args:
        bundle: An opened bundle.
        on_file: Called with name and size of each file before it is hashed.

    Returns:
        The number of files that had to be read.

    Raises:
        BundleError: A file was altered.
    """
    read = 0
    for name, record in bundle.manifest.files.items():
        path = bundle.file(name).resolve()
        status = path.stat()
        note: dict[str, str | int] = {
            "path": str(path),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": record.sha256,
        }
        memory = cache_dir() / "verified" / (hashlib.sha256(str(path).encode()).hexdigest()[:32] + ".json")
        if _read(memory) == note:
            continue
        if on_file:
            on_file(name, record.size)
        bundle.verify([name])
        _write(memory, note)
        read += 1
    return read


def _read(memory: Path) -> object:
    with suppress(OSError, ValueError):
        return json.loads(memory.read_text(encoding="utf-8"))
    return None


def _write(memory: Path, note: dict[str, str | int]) -> None:
    """Remember. Where that is not possible, the file is hashed again next time, and nothing else happens."""
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=memory.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(note, file)
            Path(temporary).replace(memory)  # whole or not at all, also with two processes at once
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
