"""Reading of the small text and JSON files of a checkpoint, with an error message for each way to fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError

__all__ = [
    "IMAGE_PROCESSOR",
    "PROCESSOR_CONFIG",
    "VIDEO_PROCESSOR",
    "added_tokens",
    "check_not_lfs_pointer",
    "file_exists",
    "read_json_object",
    "read_text",
    "shown",
]

PROCESSOR_CONFIG = "processor_config.json"
"""Newer versions of transformers write all processors and the chat template into this file."""
IMAGE_PROCESSOR = "preprocessor_config.json"
"""Settings of the image processor, in older checkpoints and in bundles."""
VIDEO_PROCESSOR = "video_preprocessor_config.json"
"""Settings of the video processor, in older checkpoints and in bundles."""

_POINTER = b"version https://git-lfs"
_DIGITS = 10  # an id of a token with more would not fit into 32 bits
_SHOWN = 200  # characters of a value in a message


def file_exists(file: Path) -> bool:
    """Return whether a file exists.

    Raises:
        CheckpointError: The path is a directory or a broken link, as an incomplete copy or download leaves
            it.
    """
    if file.is_file():
        return True
    if file.is_symlink() or file.exists():
        what = "a directory" if file.exists() else "a link to a file that is missing"
        raise CheckpointError(
            f"{file} is {what}.", "Copy the checkpoint with its files (cp -rL), or fetch that file."
        )
    return False


def check_not_lfs_pointer(file: Path) -> None:
    """Refuse a pointer of Git LFS, which stands in for a large file that was not fetched.

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
    """Read a text file of a checkpoint.

    Raises:
        CheckpointError: The file cannot be read, is a pointer of Git LFS, or is not UTF-8.
    """
    try:
        check_not_lfs_pointer(file)
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.", "Check the file.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not text in UTF-8.", "Save it in UTF-8.") from None


def read_json_object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file; return an empty one if there is no such file.

    Raises:
        CheckpointError: As for `read_text`, or the file is not a JSON object.
    """
    if not file_exists(file):
        return {}
    try:
        found = json.loads(read_text(file))
        json.dumps(found, ensure_ascii=False).encode()  # raises if an escape is only half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not JSON: {error}.", "Correct it, or take the file from the checkpoint's source."
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object.", "Take the file from the checkpoint's source.")
    return found


def added_tokens(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the entries of `added_tokens_decoder` that have an id and a text as `content`, by their ids.

    Args:
        settings: Content of tokenizer_config.json.
    """
    decoder = settings.get("added_tokens_decoder")
    return {
        int(key): entry
        for key, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if key.isdecimal()
        and len(key) < _DIGITS
        and isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
    }


def shown(value: object) -> str:
    """Return a value of a configuration as a message shows it: shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
