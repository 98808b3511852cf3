"""Staging directories: a directory is written whole or not at all.

Every command that makes a bundle works in a staging directory next to the destination and renames it when it
is complete, so an interrupted command leaves nothing that looks finished. While a command runs, there are two
kinds of hidden directories next to its destination:

    .visprune-partial-1f2e3d4c          the directory that is being written or removed
    .visprune-earlier-1f2e3d4c/NAME     the earlier NAME, for the moment between two renames

A killed process leaves them behind. A process holds a lock on each of its directories, and the lock ends with
the process. So `tidy` can tell the directories of a killed process from those of a running one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from visprune.errors import ExportError, UsageError

__all__ = ["check_destination", "existing_parent", "scratch", "staged", "tidy", "whole"]

_PARTIAL, _EARLIER = ".visprune-partial-", ".visprune-earlier-"
_OURS = re.compile(rf"({re.escape(_PARTIAL)}|{re.escape(_EARLIER)})[0-9a-f]{{8}}")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_destination(destination: Path, *, force: bool, marker: str) -> None:
    """Refuse a destination that exists, before any work is done.

    Args:
        destination: The directory to write.
        force: Whether an earlier result may be replaced.
        marker: Name of a file that every such result has. A directory without it is never replaced.

    Raises:
        UsageError: The destination exists and may not be replaced, or its parent is not writable.
    """
    try:
        exists = destination.exists() or destination.is_symlink()
        replaceable = exists and (destination / marker).is_file()
        parent = existing_parent(destination)
    except OSError as error:
        raise _cannot_make(destination, error) from None
    if exists and not replaceable:
        raise UsageError(f"{destination} exists and is not a bundle.", "Choose another directory with -o.")
    if exists and not force:
        raise UsageError(
            f"{destination} exists.", "Choose another directory with -o, or replace it with --force."
        )
    if exists and Path.cwd().is_relative_to(_absolute(destination)):
        raise UsageError(
            f"{destination} is where you are, and would be replaced.", "Change to another directory first."
        )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} cannot be written to.", "Choose another directory with -o.")


def existing_parent(path: Path) -> Path:
    """Return the nearest directory above `path` that exists."""
    parent = _absolute(path).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _absolute(path: Path) -> Path:
    """Return an absolute path without `..`, which would need directories that may not exist."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps `..`


def _cannot_make(destination: Path, error: OSError) -> UsageError:
    return UsageError(f"{destination} cannot be made: {error.strerror}.", "Choose another directory with -o.")


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `destination` if the block succeeds.

    A destination that exists now is replaced, because `check_destination` has allowed it. A destination that
    appears while the block runs was made by somebody else, and is left alone.

    Raises:
        ExportError: The disk is full, or the destination appeared while the block ran.
        UsageError: The directory cannot be made.
    """
    destination = _absolute(destination)
    keep = existing_parent(destination)
    replaces = destination.exists()
    try:
        with _claimed(destination, _PARTIAL) as stage:
            try:
                yield stage
                _put_in_place(stage, destination, replaces=replaces)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        # NumPy reports an incomplete write without an errno.
        if error.errno in _DISK_FULL or (error.errno is None and "written" in str(error)):
            raise ExportError(
                f"The disk is full: {destination.parent} could not take the whole bundle.",
                "Free some space, or choose another disk with -o.",
            ) from error
        raise
    finally:
        parent = destination.parent
        while parent != keep and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


@contextlib.contextmanager
def scratch(destination: Path) -> Iterator[Path]:
    """Yield an empty directory next to `destination` for intermediate files; it is removed after the block.

    Raises:
        UsageError: The directory cannot be made.
    """
    with _claimed(destination.absolute(), _PARTIAL) as path:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file written there becomes `path` if the block succeeds.

    Raises:
        OSError: The disk is full, for instance. An earlier file is then unchanged.
    """
    temporary = path.with_name(f"{_PARTIAL}{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(stage: Path, destination: Path, *, replaces: bool) -> None:
    """Rename the staged directory. An earlier result is moved aside first, and moved back if that fails."""
    if not destination.exists():
        stage.rename(destination)
        return
    if not replaces:
        raise ExportError(f"{destination} has appeared meanwhile.", "Choose another directory with -o.")
    with _claimed(destination, _EARLIER) as aside:
        earlier = aside / destination.name
        try:
            destination.rename(earlier)
            stage.rename(destination)
            aside.rename(stage)  # under this name, `tidy` removes it and puts nothing back
            shutil.rmtree(stage, ignore_errors=True)
        finally:
            if not os.path.lexists(destination):
                earlier.rename(destination)
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _claimed(destination: Path, prefix: str) -> Iterator[Path]:
    """Yield a new directory next to `destination`, locked while the block runs."""
    path, descriptor = _make(destination, prefix)
    try:
        yield path
    finally:
        os.close(descriptor)


def _make(destination: Path, prefix: str) -> tuple[Path, int]:
    """Make a new directory, and return it with a descriptor that holds its lock."""
    while True:
        # The name does not use the process id, because ids are used again.
        path = destination.parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise _cannot_make(destination, error) from None
        with contextlib.suppress(FileNotFoundError):  # another process may remove it before it is locked
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def tidy(parent: Path) -> list[str]:
    """Clear the directories that killed processes left: put earlier results back, and remove the rest.

    Returns:
        A sentence for each directory that was cleared, or left alone because it may be in use.
    """
    said = []
    for path in sorted(path for path in parent.glob(".visprune-*") if _OURS.fullmatch(path.name)):
        try:
            said += _clear(path)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):
            continue  # it belongs to a running process, or is no directory of ours
        except OSError:  # the file system has no locks, or the directory belongs to another user
            holds = "an earlier bundle" if path.name.startswith(_EARLIER) else "a part of a bundle"
            said.append(f"{path} holds {holds}. If no export is running, move it away.")
    return said


def _clear(path: Path) -> list[str]:
    """Clear one directory.

    Returns:
        A sentence for each thing done.

    Raises:
        BlockingIOError: A running process holds the lock.
    """
    said = []
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.name.startswith(_EARLIER):
            for earlier in path.iterdir():
                place = path.parent / earlier.name
                if not os.path.lexists(place):
                    earlier.rename(place)
                    said.append(f"Put {place} back, which an export that did not finish was replacing.")
        shutil.rmtree(path)
    finally:
        os.close(descriptor)
    return said or [f"Removed {path.name}, left by an export that did not finish."]
