"""Verification of a bundle's files that remembers which were hashed, so that only the first load is slow.

A file counts as verified while its path, size and modification time are those of the last good hash. This
finds damaged copies and interrupted downloads. It does not protect against somebody who can set file times.
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
    """Check the files of a bundle against its manifest; skip files that are known to be good.

    Args:
        bundle: An opened bundle.
        on_file: Called with the name and size of each file before it is hashed.

    Returns:
        The number of files that were hashed.

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
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(memory.read_text(encoding="utf-8"))
    return None
