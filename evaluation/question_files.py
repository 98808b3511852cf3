"""The files of a published set, and what is common in reading them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visprune.errors import InputError, UsageError
from visprune.evaluation.questions import Question, usable

__all__ = ["Files", "cannot_read", "each", "form_of", "not_that", "part", "read_json"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a set is.

    Attributes:
        data: Its questions.
        annotations: Its answers, where they are in a file of their own, or its splits.
        images: The folder of its pictures.
        split: The split that is asked, of a set whose files hold several.
    """

    data: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str | None = None

    @property
    def beside(self) -> Path:
        """The annotations; the format needs them."""
        assert self.annotations is not None
        return self.annotations

    @property
    def folder(self) -> Path:
        """The folder of the pictures; the format needs it."""
        assert self.images is not None
        return self.images


def each(
    items: Iterable[Any],
    path: Path,
    read: Callable[[dict[str, Any], str], Question],
    where: str | None = None,
) -> Iterator[Question | str]:
    """Each record as a question, or why it is none."""
    for number, item in enumerate(items, 1):
        place = where or f"Entry {number} of {path}"
        if not isinstance(item, dict):
            yield f"{place} is not an object."
            continue
        try:
            yield usable(read(item, place))
        except InputError as error:
            yield error.what


def read_json(path: Path, form: str, kind: type) -> Any:
    """What a JSON file holds, which must be of a kind.

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError):
        raise not_that(path, form, "it is not JSON") from None
    if type(found) is not kind:
        raise not_that(path, form, f"it holds a {type(found).__name__}")
    return found


def part(data: dict[str, Any], name: str, kind: type, path: Path, form: str) -> Any:
    """A field that the whole file depends on, which must be of a kind.

    Raises:
        UsageError: It is not there, or of another kind.
    """
    if type(data.get(name)) is not kind:
        raise not_that(path, form, f"it has no {kind.__name__} {name!r}")
    return data[name]


def not_that(path: Path, form: str, why: str) -> UsageError:
    """The error of a file of another form."""
    return UsageError(f"{path} does not have the form of {form}: {why}.", form_of(form))


def cannot_read(path: Path, error: OSError) -> UsageError:
    """The error of a file that the system does not give."""
    return UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.")


def form_of(form: str) -> str:
    """What to do about files that are something else."""
    return f"Give the files of {form} as they were published; docs/eval.md names them."
