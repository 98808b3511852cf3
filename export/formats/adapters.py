"""Adapters in the format of PEFT, and what LLaVA's own training writes beside one.

An adapter is read here without its values. `visprune.export.checkpoint.merging` merges it into a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.foreign import ADAPTER_CONFIG
from visprune.export.files.located import HUB_ID, Located
from visprune.export.files.shards import read_headers
from visprune.export.files.small_files import file_exists, read_json_object
from visprune.export.files.stored import TensorSource
from visprune.export.formats.lora import BiasChange, LowRankChange, read_changes, read_settings
from visprune.export.formats.original_config import is_original

__all__ = ["TRAINED", "Adapter", "check_base", "read_adapter"]

TRAINED = "non_lora_trainables.bin"
"""The parts that LLaVA's training changed as a whole, the projector among them."""

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"

# Endings of the names of quantized copies of a model, and of conversions.
_COPIES = re.compile(r"([-_](unsloth|bnb|4bit|8bit|awq|gptq|int4|int8|hf))+$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter.

    Attributes:
        place: Its directory, with its name and revision.
        base: The model that it was trained on, a hub id or a path; empty if it does not say that.
        files: The files that decide its values.
        changes: The changes of modules.
        replaced: Tensors that replace those of the model or are added to it, by the adapter's names for them.
        model_config: Configuration of the model in LLaVA's original format, if it lies beside the adapter.
    """

    place: Located
    base: str
    files: tuple[Path, ...]
    changes: tuple[LowRankChange | BiasChange, ...]
    replaced: Mapping[str, TensorSource]
    model_config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Hub id, or name of the directory."""
        return self.place.name

    @property
    def edits(self) -> tuple[tuple[str, TensorSource | LowRankChange | BiasChange], ...]:
        """What it does to each tensor, in this order: what replaces it, and what is added to it."""
        return (*self.replaced.items(), *((change.target, change) for change in self.changes))


def read_adapter(place: Located, pickled: bool) -> Adapter:
    """Read the settings of an adapter, and the names and shapes of its tensors.

    Args:
        place: Its directory.
        pickled: Whether pickles may be read.

    Raises:
        CheckpointError: It is incomplete or contradicts itself.
        UnsupportedError: It is of a kind that is not merged, or has pickles that may not be read.
    """
    path = place.path
    config = path / ADAPTER_CONFIG
    if not file_exists(config):
        inside = sorted(path.glob(f"*/{ADAPTER_CONFIG}"))
        raise CheckpointError(
            f"{path} has no {ADAPTER_CONFIG}.",
            f"Give the adapter inside: {' or '.join(str(file.parent) for file in inside)}"
            if inside
            else "Give the directory that peft's save_pretrained() wrote.",
        )
    settings = read_json_object(config)
    lora = read_settings(place.name, settings)
    if file_exists(path / _WEIGHTS):
        files = [path / _WEIGHTS]
    elif file_exists(path / _PICKLE):
        files = [_allowed(path / _PICKLE, pickled)]
    else:
        raise CheckpointError(
            f"{path} has no {_WEIGHTS}.", "Give the directory that peft's save_pretrained() wrote."
        )
    changes, replaced = read_changes(lora, read_headers(files))
    if file_exists(path / TRAINED):
        files.append(_allowed(path / TRAINED, pickled))
        _, trained = read_changes(lora, read_headers(files[-1:]))
        if twice := trained.keys() & replaced.keys():
            raise CheckpointError(
                f"Both {TRAINED} and {files[0].name} in {path} have {min(twice)}.",
                "Take the files of one run.",
            )
        replaced |= trained
    if not changes and not replaced:
        raise CheckpointError(f"The adapter {path} has no tensors.", "Take another copy of it.")
    base = settings.get("base_model_name_or_path")
    model_config = read_json_object(path / "config.json")
    return Adapter(
        place,
        base if isinstance(base, str) else "",
        (*files, config),
        changes,
        replaced,
        model_config if is_original(model_config) else None,
    )


def check_base(adapter: Adapter, model: Located) -> None:
    """Refuse an adapter that says it belongs to another model.

    Only hub ids are compared, because a path names no model. A quantized copy and a conversion are the same
    model.

    Raises:
        UnsupportedError: It belongs to another model.
    """
    is_id = HUB_ID.fullmatch(adapter.base) is not None and not adapter.base.startswith(".")
    if model.revision is not None and is_id and _plain(adapter.base) != _plain(model.name):
        raise UnsupportedError(
            f"The adapter {adapter.name} was trained on {adapter.base}, and the model is {model.name}.",
            f"Give {adapter.base} as the model. If both are the same model, correct base_model_name_or_path "
            f"in {ADAPTER_CONFIG}.",
        )


def _plain(hub_id: str) -> str:
    """Return the name of a model in the form in which those of its copies are equal."""
    return re.sub(r"(^|-)v(?=\d)", r"\1", _COPIES.sub("", hub_id.rpartition("/")[2].lower()))


def _allowed(file: Path, pickled: bool) -> Path:
    """Return a pickled file if it may be read."""
    if pickled:
        return file
    raise UnsupportedError(
        f"The adapter {file.parent} has weights in a pickle, {file.name}.",
        "Let plain tensors be read from it with --pickled-weights.",
    )
