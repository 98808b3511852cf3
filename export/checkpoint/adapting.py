"""The adapters of a checkpoint: one that lies beside its weights, and those that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.export.checkpoint.checkpoint import Part
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.files import foreign
from visprune.export.files.located import Located, locate
from visprune.export.formats.adapters import TRAINED, Adapter, check_base, read_adapter
from visprune.export.formats.original_config import is_original

__all__ = ["adapted_config", "find_adapters", "notes_of", "parts_of"]


def find_adapters(place: Located, options: CheckpointOptions, *, download: bool) -> tuple[Adapter, ...]:
    """Read the adapters of a model, in the order in which they are merged.

    Args:
        place: The model.
        options: How it is read.
        download: Whether files that are not in the hub's cache may be downloaded.

    Raises:
        UsageError: An adapter is given twice.
        CheckpointError: An adapter was not found, is incomplete, or contradicts itself.
        UnsupportedError: The model is itself an adapter, or an adapter is of another model or of a kind that
            is not merged.
    """
    name = str(place.path) if place.revision is None else place.name
    found = []
    if foreign.check_adapter(place.path, name):
        found.append(read_adapter(place, options.pickled_weights))
    seen = {place.path.resolve()} if found else set()
    for given in options.adapter or ():
        # Pickles are wanted even if they may not be read, because they may hold a part of the adapter.
        adapter = locate(given, pickles=True, download=download)
        if adapter.path.resolve() in seen:
            raise UsageError(f"The adapter {given} would be merged twice.", "Give it once.")
        seen.add(adapter.path.resolve())
        found.append(read_adapter(adapter, options.pickled_weights))
        check_base(found[-1], place)
    return tuple(found)


def adapted_config(config: dict[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the configuration of a model after its adapters were merged.

    LLaVA's own training makes a LLaVA of a language model, and writes its configuration beside the adapter.
    A checkpoint in the format of transformers keeps its own.

    Args:
        config: The content of the model's config.json.
        adapters: Its adapters.

    Raises:
        CheckpointError: They make a LLaVA of a language model, and none of them has the projector.
        UnsupportedError: The model is no LLaVA, and none of them makes it one.
    """
    from visprune.export import models

    if "text_config" in config or not adapters:
        return config
    given = next((one.model_config for one in reversed(adapters) if one.model_config is not None), None)
    kind = config.get("model_type")
    if is_original(config) or kind in models.MODELS:
        return given or config
    where = adapters[-1].place.path
    if given is None:
        raise UnsupportedError(
            f"The model is no LLaVA (its model type is {kind!r}), and {where} has no config.json of one.",
            "Put the config.json that LLaVA's training wrote beside the adapter, or give the LLaVA that the "
            "adapter was trained on.",
        )
    if not any("mm_projector" in name for one in adapters for name in one.replaced):
        raise CheckpointError(
            f"The model is a language model alone, and {where} has no {TRAINED} with the projector.",
            f"Take the {TRAINED} that LLaVA's training wrote beside the adapter.",
        )
    return given


def parts_of(adapters: Sequence[Adapter]) -> tuple[Part, ...]:
    """Return the adapters as parts of a checkpoint."""
    return tuple(Part("adapter", one.name, one.place.revision, one.files) for one in adapters)


def notes_of(place: Located, adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Return a sentence on the adapter that lies beside a model's weights, or nothing."""
    if not any(one.place == place for one in adapters):
        return ()
    return (f"{place.name} has an adapter beside its weights, which is merged into them.",)
