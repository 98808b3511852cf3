"""A checkpoint: the files of a model and of its parts, and where each of its tensors is.

Whatever the format on disk, a `Checkpoint` describes a model of transformers. What a format says otherwise is
translated when the checkpoint is found (see `find`), so no other module needs to know about formats.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from visprune.export.files.small_files import read_json_object
from visprune.export.files.stored import TensorSource
from visprune.export.formats.adapters import Adapter
from visprune.records import sha256

__all__ = ["Checkpoint", "Part", "short_name"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model that comes from a place of its own.

    Attributes:
        role: "vision tower" or "adapter".
        name: Hub id, or name of the directory.
        revision: The commit of a hub id; None for a directory.
        files: The files that decide its values.
    """

    role: Literal["vision tower", "adapter"]
    name: str
    revision: str | None
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed the checks.

    Attributes:
        name: Name for the manifest: the hub id, the directory's name, or the demo model's name.
        path: Local directory.
        model_type: The `model_type` of its configuration.
        weights: The files with its own weights; all of them exist and are complete.
        tensors: Where each tensor is, by the names that transformers knows.
        revision: The commit of a hub id; None for a directory.
        trust_remote_code: Whether transformers may run code that lies beside the weights.
        replaced: Content of JSON files that replaces those on disk, by file name.
        placeholders: Ids of tokens that stand for images and videos and that its tokenizer lacks, by text.
        chat_template: Source of a chat template that replaces the checkpoint's; None for its own.
        conversation: Name of the prompt form that replaces the checkpoint's chat template; None for its own.
        adapters: Adapters to merge into the tensors when they are read, in this order.
        parts: Other places that some of the values come from, the adapters among them.
        notes: Sentences that a user should read before using the bundle.
    """

    name: str
    path: Path
    model_type: str
    weights: tuple[Path, ...]
    tensors: Mapping[str, TensorSource]
    revision: str | None = None
    trust_remote_code: bool = False
    replaced: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    conversation: str | None = None
    adapters: tuple[Adapter, ...] = ()
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    _hashes: dict[Path, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def short_name(self) -> str:
        """Its name for files; see `short_name`."""
        return short_name(self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that decide the values of its tensors."""
        return (*self.weights, *(file for part in self.parts for file in part.files))

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def largest(self) -> int:
        """Number of elements of the largest tensor."""
        return max((tensor.elements for tensor in self.tensors.values()), default=0)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file of the checkpoint; an empty one if there is no such file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        found = self.replaced.get(name)
        return read_json_object(self.path / name) if found is None else found

    def weights_sha256(self, check_cancelled: Callable[[], None] = lambda: None) -> str:
        """Return one SHA-256 over the names and hashes of all its files with weights.

        Args:
            check_cancelled: Called while the files are read; it may raise to stop the reading.
        """
        return self.sha256_of(self.files, check_cancelled)

    def sha256_of(self, files: tuple[Path, ...], check_cancelled: Callable[[], None] = lambda: None) -> str:
        """Return one SHA-256 over the names and hashes of some of its files, each of which is read once.

        Args:
            files: The files, in the order in which they are hashed.
            check_cancelled: As for `weights_sha256`.
        """
        digest = hashlib.sha256()
        for path in files:
            if path not in self._hashes:
                self._hashes[path] = sha256(path, check_cancelled)
            digest.update(f"{path.name} {self._hashes[path]}\n".encode())
        return digest.hexdigest()


def short_name(name: str) -> str:
    """Return the last part of a hub id or directory, with unusual characters replaced by hyphens."""
    return re.sub(r"[^\w.-]+", "-", Path(name).name.strip("/")) or "model"
