"""The file of answers, from which a stopped run goes on.

Its first line says what was asked, and how; each bundle has a line when it begins, and each answer has one,
which is on the disk before the next is taken. A line that was cut off is dropped; answers to other questions,
or of another bundle in the place of one, are never mixed with these.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from visprune.errors import BundleError, UsageError
from visprune.evaluation.answering import Answer
from visprune.records import from_json

__all__ = ["Ledger"]

_FORMAT = 1
_ANOTHER = "Give another file with -o, or begin this one again with --force."


class Ledger:
    """Answers by bundle and question. Use it in a `with`.

    Args:
        path: The file; None to remember nothing.
        asked: What was asked, and how: a JSON object, the same for all answers of a file.
        force: Whether a file of answers that is there is begun again.

    Raises:
        UsageError: The file cannot be written, is none of answers, is in use, or is of something else asked.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any], *, force: bool = False) -> None:
        self.path = path
        self._known: dict[str, dict[str, Answer]] = {}
        self._places: dict[str, str] = {}
        self._file: int | None = None
        self._begun = False  # by this run
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._lock(self._file, path)
            self._read(path, {"visprune_eval": _FORMAT, **asked}, force=force)
        except OSError as error:
            self._close()
            raise _cannot_write(path, error) from None
        except BaseException:
            self._close()
            raise

    def answers(self, identity: str) -> dict[str, Answer]:
        """What a bundle has answered, by the question's key."""
        return self._known.get(identity, {})

    def begin(self, place: str, identity: str) -> None:
        """A bundle is about to answer.

        Raises:
            UsageError: Another bundle has answered under this name, or the file cannot be written.
        """
        if self._places.get(place, identity) != identity:
            raise UsageError(f"{place} has changed since {self.path} was begun.", _ANOTHER)
        if place not in self._places:
            self._write({"place": place, "bundle": identity})
            self._places[place] = identity

    def add(self, identity: str, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            UsageError: The file cannot be written.
        """
        self._write({"bundle": identity, **asdict(answer)})
        self._known.setdefault(identity, {})[answer.key] = answer

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._begun and not self._known and self.path is not None:
            self.path.unlink(missing_ok=True)  # it would bind the next run, and holds nothing
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @staticmethod
    def _lock(file: int, path: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another run is writing {path}.", "Wait for it, or give another file."
            ) from None
        except OSError:  # not every file system has locks
            pass

    def _read(self, path: Path, first: dict[str, Any], *, force: bool) -> None:
        """Take what the file holds; drop a line that was cut off."""
        assert self._file is not None
        with os.fdopen(os.dup(self._file), "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
        begun = _object(lines[0]) if lines else {}
        if content and "visprune_eval" not in begun and not _began(content):
            raise UsageError(f"{path} exists and holds no answers.", "Give another file with -o.")
        if force or not lines:
            os.ftruncate(self._file, 0)
            self._write(first)
            self._begun = True
            return
        for name, value in first.items():
            if begun.get(name) != value:
                raise UsageError(f"{path} was begun with {_differs(name, begun.get(name), value)}.", _ANOTHER)
        for number, line in enumerate(lines[1:], 2):
            self._take(_object(line), f"Line {number} of {path}")
        os.ftruncate(self._file, len(whole))

    def _take(self, line: dict[str, Any], where: str) -> None:
        bundle = line.pop("bundle", None)
        place = line.get("place", "")
        if not isinstance(bundle, str) or not isinstance(place, str):
            raise UsageError(f"{where} is no answer.", _ANOTHER)
        if place:
            self._places[place] = bundle
            return
        try:
            found = from_json(Answer, line, where)
        except BundleError as error:
            raise UsageError(error.what, _ANOTHER) from None
        self._known.setdefault(bundle, {})[found.key] = found

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
        try:
            end = os.lseek(self._file, 0, os.SEEK_END)
            try:
                while data:
                    data = data[os.write(self._file, data) :]
                os.fsync(self._file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, end)
                raise
        except OSError as error:
            assert self.path is not None
            raise _cannot_write(self.path, error) from None


def _object(line: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _began(content: bytes) -> bool:
    """Whether all there is is a first line that was cut off."""
    return b"\n" not in content and b'{"visprune_eval"'.startswith(content[:16])


def _differs(name: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(now) == 64:  # a hash tells nobody anything
        return f"other {name}"
    return f"{name} {before!r}, and now it is {now!r}"


def _cannot_write(path: Path, error: OSError) -> UsageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "Free some space" if full else "Choose another file with -o"
    return UsageError(f"{path} cannot be written: {error.strerror}.", f"{hint}, and run it again.")
