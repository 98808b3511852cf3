"""Remembers which files of a bundle were hashed, so that only the first load of large weights is slow.

A file counts as verified while its path, size and time of change are those of the last good hash. That
guards against damaged copies and interrupted downloads, not against somebody who can set file times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from visprune.bundle import Bundle
from visprune.caches import cache_dir, keep

__all__ = ["verify"]


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
        memory = cache_dir("verified") / (hashlib.sha256(str(path).encode()).hexdigest()[:32] + ".json")
        if _read(memory) == note:
            continue
        if on_file:
            on_file(name, record.size)
        bundle.verify([name])
        keep(memory, partial(Path.write_text, data=json.dumps(note), encoding="utf-8"))
        read += 1
    return read


def _read(memory: Path) -> object:
    with suppress(OSError, ValueError):
        return json.loads(memory.read_text(encoding="utf-8"))
    return None
