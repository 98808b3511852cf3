"""Finding the checkpoint to export, and checking it before its weights are read.

The checks cover the kind of model, the file format, missing and truncated files, and tensors that contradict
each other. Pickles are read only if the user allows it, and then as plain tensors; code that lies beside the
weights runs only if the user trusts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UsageError
from visprune.export.checkpoint.adapting import adapted_config, find_adapters, notes_of, parts_of
from visprune.export.checkpoint.checkpoint import Checkpoint, Part
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.conversations import choose
from visprune.export.checkpoint.template import read_template_file
from visprune.export.files import foreign
from visprune.export.files.located import Located, locate
from visprune.export.files.shards import find_files, read_headers
from visprune.export.files.small_files import read_json_object
from visprune.export.files.stored import TensorSource
from visprune.export.formats.original import translated
from visprune.export.formats.original_config import is_original

__all__ = ["configuration", "find"]

_DEFAULTS = CheckpointOptions()


def find(
    model: str | Path | None, options: CheckpointOptions = _DEFAULTS, *, download: bool = True
) -> Checkpoint:
    """Find a model and check its files.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        options: How it is read.
        download: Whether files that are not in the hub's cache may be downloaded.

    Raises:
        UsageError: Options that do not fit the model.
        CheckpointError: The checkpoint was not found, is incomplete, or cannot be read.
        UnsupportedError: The checkpoint is of a kind that cannot be exported.
    """
    if options.revision is not None and (model is None or Path(model).exists()):
        raise UsageError(
            f"A revision belongs to a hub id, and the model is {model or 'the bundled demo model'}.",
            "Leave --revision out, or give a hub id such as llava-hf/llava-1.5-7b-hf.",
        )
    if model is None:
        from visprune.bundled import DEMO, MODEL_DIR

        return _open(Located(MODEL_DIR, DEMO), options, download=download)
    found = locate(
        model,
        options.revision,
        pickles=options.pickled_weights,
        code=options.trust_remote_code,
        download=download,
    )
    return _open(found, options, download=download)


def configuration(place: Located) -> Checkpoint:
    """Describe a checkpoint of which only the configuration is read; its weights need not be there.

    Raises:
        CheckpointError: There is no configuration, or it cannot be read.
        UnsupportedError: It is in LLaVA's original format and has a setting that is not supported.
    """
    config = _read_config(place.path)
    found = Checkpoint(place.name, place.path, str(config.get("model_type", "")), (), {})
    return _translate(found, config, None, _DEFAULTS, download=True) if is_original(config) else found


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json.", "Give the directory of a checkpoint.")
    return read_json_object(file)


def _open(place: Located, options: CheckpointOptions, *, download: bool) -> Checkpoint:
    """Check the files of a directory, in the order from cheap to expensive, and describe them."""
    from visprune.export import models

    path = place.path
    adapters = find_adapters(place, options, download=download)
    config = adapted_config(_read_config(path), adapters)
    foreign.check_config(path, config)
    if not is_original(config):
        models.family(str(config.get("model_type", "")))
    files, index = find_files(path, options.pickled_weights)
    tensors = read_headers(files, index)
    foreign.check_names(path, tensors)
    given = options.chat_template
    found = Checkpoint(
        name=place.name,
        path=path,
        model_type=str(config.get("model_type", "")),
        weights=files,
        tensors=tensors,
        revision=place.revision,
        trust_remote_code=options.trust_remote_code,
        chat_template=None if given is None else read_template_file(Path(given)),
        conversation=options.conversation,
        adapters=adapters,
        parts=parts_of(adapters),
        notes=notes_of(place, adapters),
    )
    if is_original(config):
        return _translate(found, config, tensors, options, download=download)
    if options.vision_tower is not None:
        raise UsageError(
            f"{path} is in the format of transformers, which has its vision tower inside.",
            "Leave --vision-tower out.",
        )
    return found


def _translate(
    found: Checkpoint,
    config: dict[str, Any],
    stored: Mapping[str, TensorSource] | None,
    options: CheckpointOptions,
    *,
    download: bool,
) -> Checkpoint:
    """Return a checkpoint in LLaVA's original format in the terms of transformers."""
    seen = translated(
        found.path,
        config,
        stored,
        options.vision_tower,
        pickles=options.pickled_weights,
        download=download,
    )
    tower, conversation = seen.tower, options.conversation
    if conversation is None and options.chat_template is None:
        conversation = choose(found.model_type, seen.special_tokens)
    towers = (Part("vision tower", tower.name, tower.revision, tower.files),) if tower.files else ()
    notes = found.notes
    if options.vision_tower is not None and not towers:
        notes += (
            f"{found.name} has the weights of its vision tower inside, and these are used; {tower.name} "
            "gives the configuration alone.",
        )
    return replace(
        found,
        model_type=seen.config["model_type"],
        tensors=seen.tensors,
        replaced=seen.files,
        placeholders=seen.placeholders,
        conversation=conversation,
        parts=(*towers, *found.parts),
        notes=notes,
    )
