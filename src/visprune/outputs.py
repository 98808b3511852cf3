"""Result files of a command: checked before the work, and written whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from visprune.errors import UsageError
from visprune.staging import whole

__all__ = ["check_file", "lock", "write_file"]


def check_file(path: Path, *, force: bool) -> None:
    """Refuse a file that could not be written, before any work is done.

    Args:
        path: The file.
        force: Whether an earlier file may be replaced.

    Raises:
        UsageError: The file exists or is a directory, or its directory is missing or not writable.
    """
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent}.", "Create it first.")
    if path.is_dir():
        raise UsageError(f"{path} is a directory.", "Name a file.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists.", "Give another name, or --force to replace it.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent} cannot be written to.", "Choose another directory.")


def write_file(path: Path, text: str) -> None:
    """Write a text file under a temporary name, and rename it when it is complete.

    Raises:
        OSError: The disk is full, for instance. An earlier file is then unchanged.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock(descriptor: int, path: Path) -> None:
    """Lock an open file or directory for this process, until it is closed.

    Raises:
        UsageError: Another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"Another run is writing {path}.", "Wait for it, or write to another place with -o."
        ) from None
    except OSError:  # this file system has no locks
        pass
