"""Write a directory whole or not at all.

Everything that makes a bundle works in a staging directory beside the destination and renames it
when it is complete, so an interrupted command leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from visprune.errors import ExportError, UsageError

__all__ = ["check_destination", "existing_parent", "staged"]

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
    try:
        exists = destination.exists() or destination.is_symlink()
        replaceable = exists and (destination / marker).is_file()
        parent = existing_parent(destination)
    except OSError as error:
        raise _cannot_make(destination, error) from None
    if exists and not force:
        raise UsageError(
            f"{destination} exists.", "Choose another directory with -o, or replace it with --force."
        )
    if exists and not replaceable:
        raise UsageError(
            f"{destination} exists and is not a bundle, so --force will not replace it.",
            "Choose another directory with -o.",
        )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} cannot be written to.", "Choose another directory with -o.")


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _cannot_make(destination: Path, error: OSError) -> UsageError:
    return UsageError(f"{destination} cannot be made: {error.strerror}.", "Choose another directory with -o.")


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `destination` if the block succeeds.

    A destination that exists now is replaced then: `check_destination` has allowed it. One that appears
    while the block runs is somebody else's, and is left alone.

    Raises:
        ExportError: The disk is full, or the destination has appeared meanwhile.
        UsageError: The directory cannot be made.
    """
    destination = destination.absolute()
    keep = existing_parent(destination)
    replaces = destination.exists()
    # Not named by the process: a killed one may have left its directory, and numbers come again.
    token = secrets.token_hex(4)
    stage = destination.parent / f".visprune-partial-{token}"
    old = destination.parent / f".visprune-old-{token}"
    try:
        _make(stage, destination)
        yield stage
        if destination.exists():
            if not replaces:
                raise ExportError(
                    f"{destination} has appeared meanwhile.", "Choose another directory with -o."
                )
            destination.rename(old)
        stage.rename(destination)
    except OSError as error:
        # NumPy reports a write that fell short without an errno.
        if error.errno in _DISK_FULL or (error.errno is None and "written" in str(error)):
            raise ExportError(
                f"The disk is full: {destination.parent} could not take the whole bundle.",
                "Free some space, or choose another disk with -o.",
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if old.exists() and not destination.exists():
            old.rename(destination)
        if old.is_symlink():  # what it points to is not ours to remove
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
        parent = destination.parent
        while parent != keep and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


def _make(stage: Path, destination: Path) -> None:
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise _cannot_make(destination, error) from None
