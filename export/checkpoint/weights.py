"""The weights of a checkpoint, each read from its file when it is asked for and forgotten after that.

Files are read and not mapped: a mapped page counts as this process's memory until it is unmapped, and a
shard has gigabytes of them. Names on disk become names in the module tree by transformers' own rules, so
the checkpoints of its older versions are read as it reads them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from visprune.errors import CheckpointError
from visprune.export.checkpoint import foreign
from visprune.export.checkpoint.shards import StoredTensor

__all__ = ["Weights", "stored_dtype"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_CHUNK = 1 << 24  # numbers that are looked at together, for a peak of memory that no tensor's size raises


@dataclass(frozen=True, slots=True)
class _Converted:
    """A tensor made of several stored ones, such as all experts in one, or of a part of one."""

    converter: WeightConverter
    sources: tuple[tuple[str, str, StoredTensor], ...]  # name on disk, pattern it fits, place
    first: str  # name of the first tensor that the conversion gives


_Place = StoredTensor | _Converted


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of a checkpoint's first tensor of floats; float32 where there is none."""
    dtypes = [_DTYPES[tensor.dtype] for tensor in stored.values()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class Weights:
    """Where the parameters of a model lie on disk.

    The model has its parameters on the meta device, and its buffers in memory. Wrappers around its modules
    share its parameters and give them other names; so a parameter is asked for by itself.

    Of the spellings of names that `foreign` knows, the one that fits with fewest tensors to spare is taken.
    What is `unused` need not be stored, or may hold no numbers: it is zeros then, as nothing depends on it.

    Args:
        model: A `PreTrainedModel`. Parameters that are tied, and of which one is stored, become one.
        stored: The checkpoint's tensors, by their names on disk.
        where: The checkpoint, for messages.
        unused: Gives the names of parameters that need not be stored; called only where that matters.

    Attributes:
        spare: Stored tensors that the model does not have, by their names on disk.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
    """

    def __init__(
        self,
        model: Any,
        stored: Mapping[str, StoredTensor],
        where: Path,
        unused: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._model = model
        self._where = where
        self._unused = cache(unused)
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        places = self._find(tensors, stored)
        taken = {tensor.name for place in places.values() for tensor in _stored(place)}
        self.spare = sorted(stored.keys() - taken)
        self._places = {tensors[name]: (name, place) for name, place in places.items()}
        self._absent = {tensor for tensor in tensors.values() if tensor not in self._places}
        for name, place in places.items():
            if isinstance(place, StoredTensor):
                self._check(name, tensors[name], place.shape)
        for tensor in tensors.values():
            if not tensor.is_meta and tensor not in self._absent:  # a buffer that is stored
                tensor.copy_(self.read(tensor))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of them."""
        return foreign.spare_note(self.spare)

    def _find(self, tensors: dict[str, Tensor], stored: Mapping[str, StoredTensor]) -> dict[str, _Place]:
        """Where all that is needed lies; tied parameters become one."""
        fitting: list[tuple[int, dict[str, _Place], dict[str, str]]] = []
        failures = []
        for names in foreign.spellings(stored):
            places = _places(self._model, tensors, names)
            twins = _twins(self._model, places)
            taken = {tensor.name for place in places.values() for tensor in _stored(place)}
            lacking = tensors.keys() - places.keys() - twins.keys()
            if lacking := lacking and lacking - set(self._unused()):
                failures.append(foreign.missing(self._where, lacking, places, stored.keys() - taken))
            else:
                fitting.append((len(stored) - len(taken), places, twins))
        if not fitting:
            raise failures[0]
        _, places, twins = min(fitting, key=lambda one: one[0])
        _tie(self._model, tensors, places, twins)
        return places

    def read(self, tensor: Tensor) -> Tensor:
        """The values of a parameter of the model, as they are stored; any other tensor as it is.

        Raises:
            CheckpointError: It does not fit the configuration, its file changed, or a number in it is none.
        """
        if tensor in self._absent:
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
        if tensor not in self._places:
            return tensor
        name, place = self._places[tensor]
        if isinstance(place, StoredTensor):
            value = _read(place)
            if not _is_finite(value):
                if name not in self._unused():
                    raise _no_number(place)
                value = torch.zeros_like(value)
            return value
        converter = copy.deepcopy(place.converter)  # it keeps what it is given
        for source, pattern, part in place.sources:
            future: Future[Tensor] = Future()  # what a converter takes
            future.set_result(_read(part))
            if not _is_finite(future.result()):
                raise _no_number(part)
            converter.add_tensor(place.first, source, pattern, future)
        made = converter.convert(place.first, model=self._model, config=self._model.config)[name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        self._check(name, tensor, tuple(whole.shape))
        return whole

    def fill(
        self, module: nn.Module, dtype: torch.dtype | None = None, but: nn.Module | None = None
    ) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Read a module's parameters into it, in this dtype or as stored; give those they replace.

        Those of `but`, a part of it, are left out.
        """
        made: dict[Tensor, nn.Parameter] = {}
        replaced = []
        left = set() if but is None else set(but.modules())
        for owner in (owner for owner in module.modules() if owner not in left):
            for name, tensor in list(owner.named_parameters(recurse=False)):
                if tensor not in made:
                    made[tensor] = nn.Parameter(self.read(tensor).to(dtype), requires_grad=False)
                setattr(owner, name, made[tensor])
                replaced.append((owner, name, tensor))
        return replaced

    @contextlib.contextmanager
    def held(self, module: nn.Module, dtype: torch.dtype, but: nn.Module | None = None) -> Iterator[None]:
        """Have a module's parameters in memory as `fill` does, for as long as the block runs."""
        replaced = self.fill(module, dtype, but)
        try:
            yield
        finally:
            for owner, name, tensor in replaced:
                setattr(owner, name, tensor)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"The weights of {self._where} do not fit its config.json: {name} is {list(shape)} and not "
                f"{list(tensor.shape)}.",
                "Take the config.json that belongs to the weights.",
            )


def _places(model: Any, tensors: dict[str, Tensor], stored: Mapping[str, StoredTensor]) -> dict[str, _Place]:
    """Where the model's tensors are stored, by their names in it. What it does not have is left out."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    places: dict[str, _Place] = {}
    parts: dict[str, list[tuple[str, str, StoredTensor]]] = {}
    # Experts are put together in the order of their numbers, as transformers sorts them.
    for key in sorted(stored, key=_numbered):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = key, None
        if pattern is None:
            places[name] = stored[key]
        else:
            parts.setdefault(name, []).append((key, pattern, stored[key]))
    for first, sources in parts.items():
        converter = by_pattern[sources[0][1]]
        for target in converter.target_patterns:
            name = first.replace(converter.target_patterns[0], target)
            places[name] = _Converted(converter, tuple(sources), first)
    return {name: place for name, place in places.items() if name in tensors}


def _numbered(key: str) -> list[tuple[int, int, str]]:
    """Sorts the parts of a name that are numbers by their size."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _twins(model: Any, places: Collection[str]) -> dict[str, str]:
    """For parameters that are not stored: the one that each is tied to and that is.

    Published checkpoints say in their text configuration alone that the head is the embedding, where some
    classes of transformers do not look.
    """
    tied = dict(model.all_tied_weights_keys)
    if getattr(model.config.text_config, "tie_word_embeddings", False):
        tied |= model._tied_weights_keys or {}
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    twins: dict[str, str] = {}
    for names in groups.values():
        twin = next((name for name in names if name in places), None)
        twins |= {name: twin for name in names if twin is not None and name not in places}
    return twins


def _tie(model: Any, tensors: dict[str, Tensor], places: dict[str, _Place], twins: Mapping[str, str]) -> None:
    """Let each of some parameters be the one that it is tied to."""
    for name, twin in twins.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensors[twin])
        tensors[name], places[name] = tensors[twin], places[twin]


def _read(place: StoredTensor) -> Tensor:
    """One tensor, into memory of its own."""
    values = torch.empty(place.length, dtype=torch.uint8)
    left = values.numpy().data
    with place.file.open("rb", buffering=0) as file:  # opened each time: threads read side by side
        file.seek(place.offset)
        while left and (count := file.readinto(left)):
            left = left[count:]
    if left:
        raise CheckpointError(
            f"The weight file {place.file} became shorter while it was read.", "Download it again."
        )
    return values.view(_DTYPES[place.dtype]).reshape(place.shape)


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers alone; looked at in parts."""
    parts = tensor.flatten().split(_CHUNK) if tensor.is_floating_point() else ()
    return all(bool(part.isfinite().all()) for part in parts)


def _no_number(place: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"The tensor {place.name} in {place.file} holds NaN or infinity.",
        "The model cannot compute anything with it: take weights that were saved before that happened.",
    )


def _stored(place: _Place) -> tuple[StoredTensor, ...]:
    """The stored tensors that one of the model is made of."""
    return (place,) if isinstance(place, StoredTensor) else tuple(part for _, _, part in place.sources)
