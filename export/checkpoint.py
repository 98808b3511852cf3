"""Find, check and load the checkpoint to export.

Everything that can be wrong with a checkpoint is looked for before its weights are touched: its
kind, its format, missing and truncated files. Weights are read from safetensors only, mapped and
not copied; pickles and remote code are never loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.records import sha256

__all__ = ["Checkpoint", "find"]

# Marks of LLaVA checkpoints in the format of the original repository.
_ORIGINAL_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)  # without slots: the hash is kept
class Checkpoint:
    """A checkpoint directory that passed the checks.

    Attributes:
        name: As the user gave it, for the manifest.
        path: Local directory.
        model_type: From config.json.
        weights: The safetensors files, all there and whole.
        elements: Numbers in them.
    """

    name: str
    path: Path
    model_type: str
    weights: tuple[Path, ...]
    elements: int

    @property
    def short_name(self) -> str:
        """For file names."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name.strip("/")) or "model"

    @cached_property
    def weights_sha256(self) -> str:
        """One hash over the hashes of the weight files, in the order of their names; they are read once."""
        digest = hashlib.sha256()
        for path in self.weights:
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        return digest.hexdigest()


def find(model: str | Path | None) -> Checkpoint:
    """Locate a model and check its files.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.

    Raises:
        CheckpointError: Not found, not complete, not readable.
        UnsupportedError: Found, and of a kind that cannot be exported.
    """
    if model is None:
        from visprune.demo import MODEL_DIR

        return _check(MODEL_DIR, "visprune-demo")
    path = Path(model)
    if path.is_dir():
        return _check(path, path.resolve().name)
    if path.is_file():
        raise CheckpointError(f"{path} is a file.", "Give the directory of a checkpoint, or a hub id.")
    if _HUB_ID.fullmatch(str(model)):
        return _check(_download(str(model)), str(model))
    raise CheckpointError(
        f"There is no directory {path}, and it is not a hub id.",
        "Give a directory, or an id such as llava-hf/llava-1.5-7b-hf.",
    )


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds, and each means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no local directory and could not be downloaded: {reason}",
            "Check the id and the network, or download it elsewhere and give the directory.",
        ) from None


def _check(path: Path, name: str) -> Checkpoint:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no config.json.", "Give the directory of a Hugging Face checkpoint."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}.", "Download the checkpoint again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a configuration.", "Download the checkpoint again.")
    model_type = str(config.get("model_type", ""))
    _check_kind(path, config, model_type)
    files = _weight_files(path)
    return Checkpoint(name, path, model_type, files, sum(_check_safetensors(file) for file in files))


def _check_kind(path: Path, config: dict[str, Any], model_type: str) -> None:
    from visprune.export import models

    listed = config.get("architectures")
    architectures = [str(a) for a in listed] if isinstance(listed, list) else []
    original = any(key in config for key in _ORIGINAL_KEYS) or any(
        a.startswith("Llava") and a.endswith("ForCausalLM") for a in architectures
    )
    if original:
        raise UnsupportedError(
            f"{path} is a LLaVA checkpoint in the original format, not in the Hugging Face format.",
            "Take the converted one, such as llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b.",
        )
    models.family(model_type)
    if "quantization_config" in config:
        raise UnsupportedError(
            f"{path} holds quantized weights.", "Export the unquantized checkpoint, and quantize the bundle."
        )


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index} cannot be read.", "Download the checkpoint again.") from None
        if any(Path(str(name)).name != name for name in names):
            raise CheckpointError(
                f"{index} names files outside the checkpoint.", "Download it from its source."
            )
        files = tuple(path / name for name in names)
    else:
        files = tuple(sorted(path.glob("model*.safetensors")))
    if not files:
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        if pickles:
            raise CheckpointError(
                f"{path} has its weights as pickles ({pickles[0].name}), which are never loaded.",
                "Convert them to safetensors: load and save the model once with transformers.",
            )
        raise CheckpointError(f"{path} has no weights.", "Download model.safetensors into it.")
    return files


def _check_safetensors(file: Path) -> int:
    """Compare a file's size with what its header promises; the numbers in it."""
    hint = "Download it again."
    if not file.is_file():
        raise CheckpointError(f"The weight file {file} is missing.", hint)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise CheckpointError(f"The weight file {file} is truncated.", hint)
            header = json.loads(stream.read(length))
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        elements = sum(int(math.prod(entry["shape"])) for entry in entries)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"The weight file {file} is not safetensors, or is truncated.", hint) from None
    if size != promised:
        raise CheckpointError(
            f"The weight file {file} has {size} bytes, and its header promises {promised}.", hint
        )
    return elements
