"""Finding the checkpoint to export, and checking it before its weights are read.

The checks cover the kind of model, the file format, missing and truncated files, and tensors that contradict
each other. Weights are read from safetensors only: pickles are never loaded, and code that lies beside the
weights runs only if the user trusts it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from visprune.errors import CheckpointError, UsageError
from visprune.export.checkpoint import foreign
from visprune.export.checkpoint.shards import find_files, read_headers
from visprune.export.checkpoint.small_files import read_json_object
from visprune.records import sha256

__all__ = ["Checkpoint", "find"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory that passed the checks.

    Attributes:
        name: Name for the manifest: the hub id, the directory's name, or the demo model's name.
        path: Local directory.
        model_type: The `model_type` of config.json.
        weights: The safetensors files; all of them exist and are complete.
        elements: Total number of elements in all tensors.
        largest: Number of elements in the largest tensor.
        revision: The commit of a hub id; None for a directory.
        trust_remote_code: Whether transformers may run code that lies beside the weights.
    """

    name: str
    path: Path
    model_type: str
    weights: tuple[Path, ...]
    elements: int
    largest: int
    revision: str | None = None
    trust_remote_code: bool = False
    _hash: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def short_name(self) -> str:
        """Name for files: the last part of `name`, with unusual characters replaced by hyphens."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name.strip("/")) or "model"

    def weights_sha256(self, check_cancelled: Callable[[], None] = lambda: None) -> str:
        """Return one SHA-256 over the names and hashes of the weight files, in the order of their names.

        The files are read on the first call; later calls return the same hash.

        Args:
            check_cancelled: Called while the files are read; it may raise to stop the reading.
        """
        if not self._hash:
            digest = hashlib.sha256()
            for path in self.weights:
                digest.update(f"{path.name} {sha256(path, check_cancelled)}\n".encode())
            self._hash.append(digest.hexdigest())
        return self._hash[0]


def find(
    model: str | Path | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    download: bool = True,
) -> Checkpoint:
    """Find a model and check its files.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether transformers may run code that lies beside the weights.
        download: Whether files that are not in the hub's cache may be downloaded.

    Raises:
        UsageError: A revision was given for a model that is not a hub id.
        CheckpointError: The checkpoint was not found, is incomplete, or cannot be read.
        UnsupportedError: The checkpoint is of a kind that cannot be exported.
    """
    path = Path(model) if model is not None else None
    if revision is not None and (path is None or path.exists()):
        raise UsageError(
            f"A revision belongs to a hub id, and the model is {path or 'the bundled demo model'}.",
            "Leave --revision out, or give a hub id such as llava-hf/llava-1.5-7b-hf.",
        )
    if path is None:
        from visprune.bundled import DEMO, MODEL_DIR

        return _check(MODEL_DIR, DEMO)
    if path.is_dir():
        return replace(_check(path, path.resolve().name), trust_remote_code=trust_remote_code)
    if path.is_file():
        raise CheckpointError(f"{path} is a file.", "Give the directory of a checkpoint, or a hub id.")
    if _HUB_ID.fullmatch(str(model)):
        snapshot = _snapshot(str(model), revision, code=trust_remote_code, download=download)
        found = _check(snapshot, str(model))
        return replace(found, revision=snapshot.name, trust_remote_code=trust_remote_code)
    raise CheckpointError(
        f"There is no directory {path}, and it is not a hub id.",
        "Give a directory, or an id such as llava-hf/llava-1.5-7b-hf.",
    )


def _snapshot(hub_id: str, revision: str | None, *, code: bool, download: bool) -> Path:
    """Return the local directory with the files of a commit; its name is the commit's hash."""
    import huggingface_hub

    files = [*_HUB_FILES, *(["*.py"] if code else [])]
    what = f"{hub_id} at {revision}" if revision else hub_id
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=files, local_files_only=not download
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


def _check(path: Path, name: str) -> Checkpoint:
    """Check the files of a directory, in the order from cheap to expensive, and describe them."""
    from visprune.export import models

    foreign.check_adapter(path)
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no config.json.", "Give the directory of a Hugging Face checkpoint."
        )
    config = read_json_object(file)
    model_type = str(config.get("model_type", ""))
    foreign.check_config(path, config)
    models.family(model_type)
    files, index = find_files(path)
    tensors = read_headers(files, index)
    foreign.check_names(path, tensors)
    sizes = [tensor.elements for tensor in tensors.values()]
    return Checkpoint(name, path, model_type, files, sum(sizes), max(sizes, default=0))
