"""The small JSON files of a checkpoint, read with sentences for what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError

__all__ = ["check_pointer", "is_there", "read_object", "read_text"]

_POINTER = b"version https://git-lfs"


def is_there(file: Path) -> bool:
    """Whether a file is there.

    Raises:
        CheckpointError: Its name is, as a link to nothing or as a directory: a copy or a download left it so.
    """
    if file.is_file():
        return True
    if file.is_symlink() or file.exists():
        what = "a directory" if file.exists() else "a link to a file that is missing"
        raise CheckpointError(
            f"{file} is {what}.", "Copy the checkpoint with its files (cp -rL), or fetch that file."
        )
    return False


def check_pointer(file: Path) -> None:
    """Refuse what Git leaves in the place of a large file that it did not fetch.

    Raises:
        CheckpointError: The file is such a pointer.
    """
    with file.open("rb") as stream:
        begin = stream.read(len(_POINTER))
    if begin == _POINTER:
        raise CheckpointError(
            f"{file} is not the file itself but a pointer of Git LFS.",
            "Fetch the files with `git lfs pull`, or download the checkpoint with `hf download`.",
        )


def read_text(file: Path) -> str:
    """A text file of a checkpoint.

    Raises:
        CheckpointError: It cannot be read, is a pointer of Git LFS, or is not UTF-8.
    """
    try:
        check_pointer(file)
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.", "Check the file.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not text in UTF-8.", "Save it in UTF-8.") from None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file.

    Raises:
        CheckpointError: As `read_text`, or it is not a JSON object.
    """
    if not is_there(file):
        return {}
    try:
        found = json.loads(read_text(file))
        json.dumps(found, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not JSON: {error}.", "Correct it, or take the file from the checkpoint's source."
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object.", "Take the file from the checkpoint's source.")
    return found
