"""Where each tensor of a model comes from: the names that stored tensors have in the model, and ties.

Names are translated by transformers' own rules, so checkpoints of older versions are read as transformers
reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from visprune.export.files.stored import TensorSource

__all__ = ["Converted", "ModelNames", "Place", "stored_parts", "tie", "tied_sources"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor of the model that is computed from stored ones, such as all experts stacked into one."""

    converter: WeightConverter
    sources: tuple[tuple[str, str, TensorSource], ...]  # name on disk, pattern that it matches, location
    first: str  # name of the first tensor that the conversion makes


Place: TypeAlias = TensorSource | Converted


class ModelNames:
    """The names of a model's tensors, and the rules that translate stored names to them.

    Args:
        model: A `PreTrainedModel`.
        tensors: Its tensors by their names.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._tensors: dict[str, Tensor] = dict(tensors)

    def name_of(self, stored: str) -> str:
        """Return the name that a stored tensor has in the model, before it is joined with others or split."""
        return self._renamed(stored, [])[0]

    def locate(self, stored: Mapping[str, TensorSource]) -> dict[str, Place]:
        """Return the locations of the model's tensors, by their names in the model.

        Stored tensors that the model does not have are left out.
        """
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        places: dict[str, Place] = {}
        parts: dict[str, list[tuple[str, str, TensorSource]]] = {}
        # Experts are stacked in the order of their numbers, as transformers sorts them.
        for key in sorted(stored, key=_numbered):
            name, pattern = self._renamed(key, self._converters)
            if pattern is None:
                places[name] = stored[key]
            else:
                parts.setdefault(name, []).append((key, pattern, stored[key]))
        for first, sources in parts.items():
            converter = by_pattern[sources[0][1]]
            for target in converter.target_patterns:
                name = first.replace(converter.target_patterns[0], target)
                places[name] = Converted(converter, tuple(sources), first)
        return {name: place for name, place in places.items() if name in self._tensors}

    def _renamed(self, stored: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
        """Return a tensor's new name, and the pattern of the converter that takes it."""
        name, pattern = rename_source_key(stored, self._renamings, converters, self._prefix, self._tensors)
        if name not in self._tensors and stored in self._tensors:
            return stored, None
        return name, pattern


def stored_parts(place: Place) -> tuple[TensorSource, ...]:
    """Return the tensors of the checkpoint from which a tensor of the model is made."""
    return tuple(part for _, _, part in place.sources) if isinstance(place, Converted) else (place,)


def tied_sources(model: Any, places: Collection[str]) -> dict[str, str]:
    """Return, for each parameter that is not stored, the name of a stored one that it is tied to.

    Some published checkpoints say only in their text configuration that the head is tied to the embedding,
    where some classes of transformers do not look.
    """
    keys = dict(model.all_tied_weights_keys)
    if getattr(model.config.text_config, "tie_word_embeddings", False):
        keys |= model._tied_weights_keys or {}
    groups: dict[str, list[str]] = {}
    for target, source in keys.items():
        groups.setdefault(source, [source]).append(target)
    tied: dict[str, str] = {}
    for names in groups.values():
        stored = next((name for name in names if name in places), None)
        tied |= {name: stored for name in names if stored is not None and name not in places}
    return tied


def tie(model: Any, tensors: dict[str, Tensor], places: dict[str, Place], tied: Mapping[str, str]) -> None:
    """Replace each parameter that is not stored by the stored one that it is tied to."""
    for name, source in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensors[source])
        tensors[name], places[name] = tensors[source], places[source]


def _numbered(key: str) -> list[tuple[int, int, str]]:
    """Return a sort key for a name by which its numeric parts are compared as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
