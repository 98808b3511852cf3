"""The file of answers, from which an interrupted run continues.

The first line says which questions were asked, and with which settings. Then each bundle has a line when it
begins, and each answer has a line, which is on the disk before the next answer is taken. A last line that was
cut off is dropped. Answers to other questions, or of a bundle that has changed, are never mixed with these.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from visprune.errors import BundleError, UsageError
from visprune.evaluation.answering import Answer
from visprune.outputs import lock
from visprune.records import from_json

__all__ = ["Ledger"]

_FORMAT = 1


class Ledger:
    """Answers by bundle and question. Use it in a `with`.

    Args:
        path: The file; None to keep answers in memory only.
        asked: Questions and settings, as a JSON object: the same for all answers of a file.
        force: Whether to start an existing file of answers anew.

    Raises:
        UsageError: The file cannot be written, is no file of answers, is in use by another run, or belongs
            to other questions or settings.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any], *, force: bool = False) -> None:
        self.path = path
        self._known: dict[str, dict[str, Answer]] = {}
        self._places: dict[str, str] = {}
        self._file: int | None = None
        self._begun = False  # whether this run made the file
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            lock(self._file, path)
            self._read(path, {"visprune_eval": _FORMAT, **asked}, force=force)
        except OSError as error:
            self._close()
            raise _cannot_write(path, error) from None
        except BaseException:
            self._close()
            raise

    def answers(self, identity: str) -> dict[str, Answer]:
        """Return the answers of a bundle by the keys of the questions.

        Args:
            identity: The hash of the bundle, from `answering.identity`.
        """
        return self._known.get(identity, {})

    def begin(self, place: str, identity: str) -> None:
        """Note that a bundle is about to answer.

        Args:
            place: Its name, from `Candidate.name`.
            identity: Its hash.

        Raises:
            UsageError: A bundle of another hash has answered under this name, or the file cannot be written.
        """
        if self.path is not None and self._places.get(place, identity) != identity:
            raise UsageError(f"{place} has changed since {self.path} was begun.", _start_again(self.path))
        if place not in self._places:
            self._write({"place": place, "bundle": identity})
            self._places[place] = identity

    def add(self, identity: str, answer: Answer) -> None:
        """Write an answer.

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
            self.path.unlink(missing_ok=True)  # it holds no answer, and would only bind the next run
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, path: Path, first: dict[str, Any], *, force: bool) -> None:
        """Read the answers that the file holds; drop a last line that was cut off."""
        assert self._file is not None
        with os.fdopen(os.dup(self._file), "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
        begun = _object(lines[0]) if lines else {}
        if content and "visprune_eval" not in begun and not _is_cut_first_line(content):
            raise UsageError(f"{path} exists and holds no answers.", "Write to another place with -o.")
        if force or not lines:
            os.ftruncate(self._file, 0)
            self._write(first)
            self._begun = True
            return
        for name, value in first.items():
            if begun.get(name) != value:
                what = _describe_change(name, begun.get(name), value)
                raise UsageError(f"{path} was begun with {what}.", _start_again(path))
        for number, line in enumerate(lines[1:], 2):
            self._take(_object(line), number, path)
        os.ftruncate(self._file, len(whole))

    def _take(self, line: dict[str, Any], number: int, path: Path) -> None:
        where = f"Line {number} of {path}"
        bundle = line.pop("bundle", None)
        place = line.get("place", "")
        if not isinstance(bundle, str) or not isinstance(place, str):
            raise UsageError(f"{where} is no answer.", _start_again(path))
        if place:
            self._places[place] = bundle
            return
        try:
            found = from_json(Answer, line, where)
        except BundleError as error:
            raise UsageError(error.what, _start_again(path)) from None
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


def _is_cut_first_line(content: bytes) -> bool:
    """Return whether a file holds nothing but a first line that was cut off."""
    return b"\n" not in content and b'{"visprune_eval"'.startswith(content[:16])


def _describe_change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(now) == 64:  # a hash tells a user nothing
        return f"other {name}"
    return f"{name} {before!r}, and now it is {now!r}"


def _start_again(path: Path) -> str:
    """Return the hint for a file that cannot be continued; it fits every command that writes one."""
    return f"Remove {path} to ask everything again, or write to another place with -o."


def _cannot_write(path: Path, error: OSError) -> UsageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "Free some space" if full else "Write to another place with -o"
    return UsageError(f"{path} cannot be written: {error.strerror}.", f"{hint}, and run it again.")
