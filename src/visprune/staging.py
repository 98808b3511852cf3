"""Write a directory whole or not at all.

Everything that makes a bundle works in a staging directory beside the destination and renames it
when it is complete, so an interrupted command leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from visprune.errors import ExportError, UsageError

__all__ = ["check_destination", "staged"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_destination(destination: Path, *, force: bool, marker: str) -> None:
    """Refuse a destination that exists, before any work is done.

    Args:
        destination: The directory to write.
        force: Whether an earlier result may be replaced.
        marker: The file that shows a directory to be such a result; nothing else is ever replaced.

    Raises:
        UsageError: It exists and may not be replaced, or its parent cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        if not force:
            raise UsageError(f"{destination} exists.", "Choose another directory with -o, or replace it with --force.")
        if not (destination / marker).is_file():
            raise UsageError(
                f"{destination} exists and is not a bundle, so --force will not replace it.",
                "Choose another directory with -o.",
            )
    parent = _existing_parent(destination)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} cannot be written to.", "Choose another directory with -o.")


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `destination` if the block succeeds.

    Raises:
        ExportError: The disk is full.
    """
    destination = destination.absolute()
    keep = _existing_parent(destination)
    stage = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    old = destination.parent / f".{destination.name}.old-{os.getpid()}"
    try:
        stage.mkdir(parents=True)
        yield stage
        if destination.exists():
            destination.rename(old)
        stage.rename(destination)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ExportError(
                f"The disk is full: {destination.parent} could not take the whole bundle.",
                "Free some space, or choose another disk with -o.",
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if old.exists() and not destination.exists():
            old.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
        parent = destination.parent
        while parent != keep and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent
