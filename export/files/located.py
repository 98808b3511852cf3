"""The directories of a model and of its parts: local ones, and snapshots of repositories on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visprune.errors import CheckpointError

__all__ = ["HUB_ID", "Located", "locate"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of an id on the hub, such as llava-hf/llava-1.5-7b-hf."""

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class Located:
    """A directory with the files of a model or of a part of it.

    Attributes:
        path: The directory.
        name: Name for the manifest: the hub id, or the directory's name.
        revision: The commit of a hub id; None for a directory.
    """

    path: Path
    name: str
    revision: str | None = None


def locate(
    model: str | Path,
    revision: str | None = None,
    *,
    pickles: bool = False,
    code: bool = False,
    download: bool = True,
) -> Located:
    """Find the directory of a model, and download it if it is a hub id.

    Args:
        model: A directory, or a hub id.
        revision: Branch, tag or commit of a hub id.
        pickles: Whether pickled weights are wanted too.
        code: Whether Python files are wanted too.
        download: Whether files that are not in the hub's cache may be downloaded.

    Raises:
        CheckpointError: It was not found.
    """
    if not str(model).strip():
        raise CheckpointError("The name of a model is empty.", "Give a directory, or a hub id.")
    path = Path(model)
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.is_file():
        raise CheckpointError(f"{path} is a file.", "Give the directory of a checkpoint, or a hub id.")
    if HUB_ID.fullmatch(str(model)):
        patterns = [*_FILES, *(["*.bin"] if pickles else []), *(["*.py"] if code else [])]
        snapshot = _snapshot(str(model), revision, patterns, download=download)
        return Located(snapshot, str(model), snapshot.name)
    raise CheckpointError(
        f"There is no directory {path}, and it is not a hub id.",
        "Give a directory, or an id such as llava-hf/llava-1.5-7b-hf.",
    )


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str], *, download: bool) -> Path:
    """Return the local directory with the files of a commit; its name is the commit's hash."""
    import huggingface_hub

    what = f"{hub_id} at {revision}" if revision else hub_id
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=list(patterns), local_files_only=not download
            )
        )
    except Exception as error:  # the hub's client raises errors of many types, which all mean the same here
        if not download:
            raise CheckpointError(
                f"{what} is not a local directory and not in the hub's cache, and a dry run downloads "
                "nothing.",
                f"Download it with: hf download {hub_id}{f' --revision {revision}' if revision else ''}",
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{what} is not a local directory and could not be downloaded: {reason}",
            "Check the id, the revision and the network, or download it elsewhere and give the directory.",
        ) from None
