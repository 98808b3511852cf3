"""Find, check and load the checkpoint to export.

Everything that can be wrong with a checkpoint is looked for before its weights are touched: its
kind, its format, missing and truncated files, tensors that contradict each other. Weights are read from
safetensors only; pickles are never loaded, and code beside them only if it is trusted.
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
from visprune.export.checkpoint.small_files import read_object
from visprune.records import sha256

__all__ = ["Checkpoint", "find"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory that passed the checks.

    Attributes:
        name: As the user gave it, for the manifest.
        path: Local directory.
        model_type: From config.json.
        weights: The safetensors files, all there and whole.
        elements: Numbers in them.
        largest: Numbers in the largest tensor.
        revision: The commit of a hub id.
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
        """For file names."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name.strip("/")) or "model"

    def weights_sha256(self, heed: Callable[[], None] = lambda: None) -> str:
        """One hash over the hashes of the weight files, in the order of their names; they are read once.

        Args:
            heed: Called as they are read; it may raise to end that.
        """
        if not self._hash:
            digest = hashlib.sha256()
            for path in self.weights:
                digest.update(f"{path.name} {sha256(path, heed)}\n".encode())
            self._hash.append(digest.hexdigest())
        return self._hash[0]


def find(
    model: str | Path | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    download: bool = True,
) -> Checkpoint:
    """Locate a model and check its files.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether transformers may run code that lies beside the weights.
        download: Whether what is not in the hub's cache may be had from the hub.

    Raises:
        UsageError: A revision of something that has none.
        CheckpointError: Not found, not complete, not readable.
        UnsupportedError: Found, and of a kind that cannot be exported.
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
    """The files of a commit, in a directory of its name."""
    import huggingface_hub

    files = [*_HUB_FILES, *(["*.py"] if code else [])]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=files, local_files_only=not download
            )
        )
    except Exception as error:  # the hub's client raises many kinds, and each means the same here
        if not download:
            raise CheckpointError(
                f"{hub_id}{f' at {revision}' if revision else ''} is no local directory and not in the hub's "
                "cache, and a dry run downloads nothing.",
                f"Download it with: hf download {hub_id}{f' --revision {revision}' if revision else ''}",
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}{f' at {revision}' if revision else ''} is no local directory and could not be "
            f"downloaded: {reason}",
            "Check the id, the revision and the network, or download it elsewhere and give the directory.",
        ) from None


def _check(path: Path, name: str) -> Checkpoint:
    from visprune.export import models

    foreign.check_adapter(path)
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no config.json.", "Give the directory of a Hugging Face checkpoint."
        )
    config = read_object(file)
    model_type = str(config.get("model_type", ""))
    foreign.check_config(path, config)
    models.family(model_type)
    files, index = find_files(path)
    tensors = read_headers(files, index)
    foreign.check_names(path, tensors)
    sizes = [tensor.elements for tensor in tensors.values()]
    return Checkpoint(name, path, model_type, files, sum(sizes), max(sizes, default=0))
