"""Files that a command writes beside its table: refused before the work, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from visprune.errors import UsageError
from visprune.staging import whole

__all__ = ["check_file", "write_file"]


def check_file(path: Path, *, force: bool) -> None:
    """Refuse a file that could not be written, before any work is done.

    Args:
        path: The file.
        force: Whether an earlier one may be replaced.

    Raises:
        UsageError: It exists, is a directory, or its directory is not there or cannot be written to.
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
    """Write a text file, under another name first.

    Raises:
        OSError: The disk is full, for instance; an earlier file is then as it was.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
