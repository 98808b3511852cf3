"""The files of a published set, and helpers that its readers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visprune.errors import InputError, UsageError
from visprune.evaluation.questions import Question, question_or_problem

__all__ = [
    "Files",
    "cannot_read",
    "format_hint",
    "read_json",
    "read_records",
    "required_field",
    "wrong_format",
]


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of a set of questions.

    Attributes:
        data: File of the questions.
        annotations: File of the answers, if it is separate, or of the splits.
        images: Folder of the images.
        split: Name of the split to read, if the files hold several.
    """

    data: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str | None = None

    @property
    def annotations_file(self) -> Path:
        """The file of annotations, for a format that requires it."""
        assert self.annotations is not None
        return self.annotations

    @property
    def folder(self) -> Path:
        """The folder of the images, for a format that requires it."""
        assert self.images is not None
        return self.images


def read_records(
    items: Iterable[Any],
    path: Path,
    read: Callable[[dict[str, Any], str], Question],
    where: str | None = None,
) -> Iterator[Question | str]:
    """Yield each record as a question, or as a sentence that says why it cannot be used.

    Args:
        items: The records.
        path: Their file, for messages.
        read: Makes a question of a record and its place.
        where: The place of the records, for messages; by default their number in the file.
    """
    for number, item in enumerate(items, 1):
        place = where or f"Entry {number} of {path}"
        if not isinstance(item, dict):
            yield f"{place} is not an object."
            continue
        try:
            yield question_or_problem(read(item, place))
        except InputError as error:
            yield error.what


def read_json(path: Path, form: str, kind: type) -> Any:
    """Read a JSON file whose content must be of a type.

    Args:
        path: The file.
        form: Name of the format, for messages.
        kind: The type, such as dict.

    Raises:
        UsageError: The file cannot be read, or its content is of another type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError):
        raise wrong_format(path, form, "it is not JSON") from None
    if type(found) is not kind:
        raise wrong_format(path, form, f"it holds a {type(found).__name__}")
    return found


def required_field(data: dict[str, Any], name: str, kind: type, path: Path, form: str) -> Any:
    """Return a field without which the whole file cannot be read, and which must be of a type.

    Raises:
        UsageError: The field is missing or of another type.
    """
    if type(data.get(name)) is not kind:
        raise wrong_format(path, form, f"it has no {kind.__name__} {name!r}")
    return data[name]


def wrong_format(path: Path, form: str, why: str) -> UsageError:
    """Return the error for a file that has another format."""
    return UsageError(f"{path} does not have the form of {form}: {why}.", format_hint(form))


def cannot_read(path: Path, error: OSError) -> UsageError:
    """Return the error for a file that cannot be read."""
    return UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.")


def format_hint(form: str) -> str:
    """Return the hint for files that have another format."""
    return f"Give the files of {form} as they were published; docs/eval.md names them."
