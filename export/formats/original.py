"""A checkpoint in LLaVA's original format: all that it holds, in the terms of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.small_files import (
    IMAGE_PROCESSOR,
    PROCESSOR_CONFIG,
    VIDEO_PROCESSOR,
    added_tokens,
    read_json_object,
)
from visprune.export.files.stored import TensorSource
from visprune.export.files.tensor_names import unwrapped
from visprune.export.formats import llava_hr
from visprune.export.formats.original_config import check, translate
from visprune.export.formats.original_images import image_processor, video_processor
from visprune.export.formats.original_names import known_name
from visprune.export.formats.vision_towers import VisionTower, find_tower, used_tensors

__all__ = ["Translated", "translated"]

_IMAGE, _VIDEO = "<image>", "<video>"
_MORE = 64  # tokens that a tokenizer may have behind the table, such as a <pad> that was never trained


@dataclass(frozen=True, slots=True)
class Translated:
    """What a checkpoint in the original format is for transformers.

    Attributes:
        config: Its configuration.
        tensors: Its tensors, with those of a vision tower from another place.
        files: Content of its JSON files, by file name.
        placeholders: Ids of the tokens that stand for images and videos, by their text.
        special_tokens: Texts of the tokens that the tokenizer's files list.
        tower: Its vision tower.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorSource]
    files: dict[str, dict[str, Any]]
    placeholders: dict[str, int]
    special_tokens: frozenset[str]
    tower: VisionTower


def translated(
    where: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorSource] | None,
    vision_tower: str | Path | None = None,
    *,
    pickles: bool = False,
    download: bool = True,
) -> Translated:
    """Translate a checkpoint in the original format.

    Args:
        where: Its directory.
        config: Content of its config.json.
        stored: Its tensors, by their names on disk; None if only the configuration is wanted.
        vision_tower: The tower that the user gives, a directory or a hub id.
        pickles: Whether pickled weights of the tower may be read.
        download: Whether its tower may be downloaded.

    Raises:
        CheckpointError: The tower is missing or does not fit, or a value makes no sense.
        UnsupportedError: A setting is not supported.
        UsageError: A tower is given for a LLaVA-HR, which has its own.
    """
    check(where, config)
    weights = _unwrapped(stored or {})
    _check_tensors(where, config, weights)
    tower = find_tower(
        where, config, None if stored is None else weights, vision_tower, pickles=pickles, download=download
    )
    listed = _listed_tokens(where, config.get("vocab_size", 0))
    free = max([config.get("vocab_size", 0), *(index + 1 for index in listed.values())])
    image = listed.get(_IMAGE, free)
    video = listed.get(_VIDEO, max(free, image + 1))
    known = translate(where, config, tower, image, video)
    _check_width(where, config, known, weights, tower)
    placeholders = {_IMAGE: image}
    files: dict[str, dict[str, Any]] = {
        "config.json": known,
        IMAGE_PROCESSOR: image_processor(config, known, tower),
        PROCESSOR_CONFIG: {},
        VIDEO_PROCESSOR: {},
    }
    if (settings := video_processor(config, known, tower)) is not None:
        placeholders[_VIDEO] = video
        files[VIDEO_PROCESSOR] = settings
    if llava_hr.is_llava_hr(config):
        weights = llava_hr.tensors(weights, known["vision_config"])
    # Buffers that older versions stored are in the model already, and their dtype is not that of the weights.
    buffers = ("rotary_emb.inv_freq", "position_ids")
    tensors = {known_name(name): place for name, place in weights.items() if not name.endswith(buffers)}
    tensors |= used_tensors(tower, known["vision_config"])
    return Translated(known, tensors, files, placeholders, frozenset(listed), tower)


def _unwrapped(stored: Mapping[str, TensorSource]) -> Mapping[str, TensorSource]:
    """Return tensors without what wrappers added to their names, unless two would have one name."""
    found = {unwrapped(name): tensor for name, tensor in stored.items()}
    return found if len(found) == len(stored) else stored


def _check_tensors(where: Path, config: Mapping[str, Any], stored: Mapping[str, TensorSource]) -> None:
    """Refuse weights that contradict the configuration, without which ids and layers mean something else."""
    rows = getattr(stored.get("model.embed_tokens.weight"), "shape", (None,))[0]
    said = config.get("vocab_size", rows)
    if rows is not None and rows != said:
        raise CheckpointError(
            f"{where} has a table of {rows} tokens, and vocab_size = {said} in its config.json.",
            "Take the config.json that belongs to the weights.",
        )
    projector = {f"model.mm_projector.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")}
    parts = ("model.mm_projector.", "model.vision_resampler.")
    for name in stored:
        if name.startswith(parts) and name not in projector:
            raise UnsupportedError(
                f"{where} has the tensor {name}, which is no part of the projector mlp2x_gelu.",
                "Only models with this projector and without a resampler can be exported.",
            )


def _listed_tokens(where: Path, rows: int) -> dict[str, int]:
    """Return the ids of the tokens that the tokenizer's files list besides its vocabulary, by their text.

    Ids far behind the embedding table, of `rows` rows, are no tokens of the model and are left out.
    """
    found: dict[str, Any] = {}
    added = read_json_object(where / "tokenizer.json").get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict):
            found[str(entry.get("content"))] = entry.get("id")
    for index, entry in added_tokens(read_json_object(where / "tokenizer_config.json")).items():
        found[entry["content"]] = index
    found |= read_json_object(where / "added_tokens.json")
    return {text: index for text, index in found.items() if type(index) is int and 0 <= index < rows + _MORE}


def _check_width(
    where: Path,
    config: Mapping[str, Any],
    known: Mapping[str, Any],
    stored: Mapping[str, TensorSource],
    tower: VisionTower,
) -> None:
    """Refuse a tower of another width than the projector takes, or than the weights inside have."""
    width = known["vision_config"].get("hidden_size")
    widths = {"mm_hidden_size in config.json": config.get("mm_hidden_size")}
    for name, tensor in stored.items():
        if name == "model.mm_projector.0.weight" and len(tensor.shape) == 2:
            widths[f"the projector ({name})"] = tensor.shape[1]
        elif name.endswith("vision_model.embeddings.patch_embedding.weight") and tensor.shape:
            widths[f"the tower's own weights ({name})"] = tensor.shape[0]
    for place, other in widths.items():
        if other is not None and other != width:
            raise CheckpointError(
                f"The vision tower {tower.name} has features of {width} numbers, and {where} has {other} in "
                f"{place}.",
                "Take the config.json that belongs to the weights."
                if llava_hr.is_llava_hr(config)
                else "Give the tower that the checkpoint was trained with, with --vision-tower.",
            )
