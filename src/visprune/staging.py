"""Write a directory whole or not at all.

Everything that makes a bundle works in a staging directory beside the destination and renames it
when it is complete, so an interrupted command leaves nothing that looks finished. Two kinds of hidden
directories lie beside a destination, for as long as a command runs:

    .visprune-partial-1f2e3d4c          what is being written, or being removed
    .visprune-earlier-1f2e3d4c/NAME     the earlier NAME, for the moment between two renames

A process that is killed leaves them. It held a lock on each, which died with it: so `tidy` can tell its
directories from those of a living one.
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
    if exists and not replaceable:
        raise UsageError(f"{destination} exists and is not a bundle.", "Choose another directory with -o.")
    if exists and not force:
        raise UsageError(
            f"{destination} exists.", "Choose another directory with -o, or replace it with --force."
        )
    if exists and Path.cwd().is_relative_to(_absolute(destination)):
        raise UsageError(f"{destination} is where you are, and would go.", "Leave it first.")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} cannot be written to.", "Choose another directory with -o.")


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    parent = _absolute(path).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _absolute(path: Path) -> Path:
    """Without `..`, whose directory would have to be made first."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps them


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
        # NumPy reports a write that fell short without an errno.
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
    """An empty directory beside `destination` for what is made on the way; it is gone after the block.

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
    """Yield a name beside `path` to write a file under, which becomes `path` if the block succeeds.

    Raises:
        OSError: The disk is full, for instance; an earlier file is then as it was.
    """
    temporary = path.with_name(f"{_PARTIAL}{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(stage: Path, destination: Path, *, replaces: bool) -> None:
    """Rename what is staged; an earlier result steps aside, and comes back if that fails."""
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
            aside.rename(stage)  # from here on nothing in it is to be put back
            shutil.rmtree(stage, ignore_errors=True)
        finally:
            if not os.path.lexists(destination):
                earlier.rename(destination)
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _claimed(destination: Path, prefix: str) -> Iterator[Path]:
    """A new directory beside `destination`, locked while the block runs."""
    path, descriptor = _make(destination, prefix)
    try:
        yield path
    finally:
        os.close(descriptor)


def _make(destination: Path, prefix: str) -> tuple[Path, int]:
    """A new directory, and a descriptor of it that holds its lock."""
    while True:
        # Not named by the process: numbers come again.
        path = destination.parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise _cannot_make(destination, error) from None
        with contextlib.suppress(FileNotFoundError):  # another process may tidy it away before it is locked
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def tidy(parent: Path) -> list[str]:
    """Clear what killed processes left in a directory: put earlier results back, remove the rest.

    Returns:
        A sentence for each thing done, and for each left alone because nothing tells whether it is in use.
    """
    said = []
    for path in sorted(path for path in parent.glob(".visprune-*") if _OURS.fullmatch(path.name)):
        try:
            said += _clear(path)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):
            continue  # of a living process, or nothing of ours
        except OSError:  # a file system without locks, or a directory of somebody else
            holds = "an earlier bundle" if path.name.startswith(_EARLIER) else "a part of a bundle"
            said.append(f"{path} holds {holds}. If no export is running, move it away.")
    return said


def _clear(path: Path) -> list[str]:
    """Clear one directory; BlockingIOError where a process holds it."""
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
