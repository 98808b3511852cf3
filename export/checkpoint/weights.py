"""The weights of a checkpoint, each read from its file when it is needed and not kept.

Files are read and not memory-mapped: a mapped page counts as memory of this process until it is unmapped, and
a shard has gigabytes of them. Names on disk are translated to names in the module tree by transformers' own
rules, so checkpoints of older versions are read as transformers reads them.
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
from visprune.export.files import foreign
from visprune.export.files.shards import ComputedTensor, TensorSource

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
_CHUNK = 1 << 24  # elements that are checked at once, so that large tensors do not raise the peak of memory


@dataclass(frozen=True, slots=True)
class _Converted:
    """A tensor of the model that is computed from stored ones, such as all experts stacked into one."""

    converter: WeightConverter
    sources: tuple[tuple[str, str, TensorSource], ...]  # name on disk, pattern that it matches, location
    first: str  # name of the first tensor that the conversion makes


_Place = TensorSource | _Converted


def stored_dtype(stored: Mapping[str, TensorSource]) -> torch.dtype:
    """Return the dtype of a checkpoint's first floating-point tensor; float32 if there is none."""
    dtypes = [_DTYPES[tensor.dtype] for tensor in stored.values()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class Weights:
    """The values of a model's parameters, read from the checkpoint's files on demand.

    The model has its parameters on the meta device and its buffers in memory. Wrappers around its modules
    share its parameters under other names, so a parameter is identified by its tensor and not by its name.

    Several sets of names are tried (see `foreign.name_variants`). Among those with which nothing is missing,
    the one that leaves the fewest stored tensors unexpected is taken. A parameter that no visual token
    depends on may be missing, or hold NaN or infinity: it is read as zeros.

    Args:
        model: A `PreTrainedModel`. Tied parameters of which only one is stored become one parameter.
        stored: The checkpoint's tensors, by their names on disk.
        where: The checkpoint, for messages.
        unused: Returns the names of parameters that need not be stored; called only if some are missing or
            not finite.

    Attributes:
        unexpected: Names on disk of stored tensors that the model does not have.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
    """

    def __init__(
        self,
        model: Any,
        stored: Mapping[str, TensorSource],
        where: Path,
        unused: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._model = model
        self._where = where
        self._unused = cache(unused)
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        places = self._find(tensors, stored)
        taken = {tensor.name for place in places.values() for tensor in _stored_parts(place)}
        self.unexpected = sorted({tensor.name for tensor in stored.values()} - taken)
        self._places = {tensors[name]: (name, place) for name, place in places.items()}
        self._absent = {tensor for tensor in tensors.values() if tensor not in self._places}
        for name, place in places.items():
            if not isinstance(place, _Converted):
                self._check(name, tensors[name], place.shape)
        for tensor in tensors.values():
            if not tensor.is_meta and tensor not in self._absent:  # a stored buffer
                tensor.copy_(self.read(tensor))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the weights that a user should read."""
        return foreign.unexpected_note(self.unexpected)

    def _find(self, tensors: dict[str, Tensor], stored: Mapping[str, TensorSource]) -> dict[str, _Place]:
        """Return the location of each tensor of the model, and tie the parameters of which one is stored."""
        fitting: list[tuple[int, dict[str, _Place], dict[str, str]]] = []
        known = {tensor.name for tensor in stored.values()}
        failures = []
        for names in foreign.name_variants(stored):
            places = _locate(self._model, tensors, names)
            tied = _tied_sources(self._model, places)
            taken = {tensor.name for place in places.values() for tensor in _stored_parts(place)}
            missing = tensors.keys() - places.keys() - tied.keys()
            if missing:
                missing -= set(self._unused())
            if missing:
                failures.append(foreign.missing_error(self._where, missing, places, known - taken))
            else:
                fitting.append((len(stored) - len(taken), places, tied))
        if not fitting:
            raise failures[0]
        _, places, tied = min(fitting, key=lambda one: one[0])
        _tie(self._model, tensors, places, tied)
        return places

    def read(self, tensor: Tensor) -> Tensor:
        """Return the stored values of a parameter of the model; return any other tensor as it is.

        The dtype is the stored one.

        Raises:
            CheckpointError: The tensor does not fit the configuration, holds NaN or infinity, or its file
                became shorter.
        """
        if tensor in self._absent:
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
        if tensor not in self._places:
            return tensor
        name, place = self._places[tensor]
        if not isinstance(place, _Converted):
            value = _read(place)
            if not _is_finite(value):
                if name not in self._unused():
                    raise _not_finite_error(place)
                value = torch.zeros_like(value)
            return value
        converter = copy.deepcopy(place.converter)  # a converter keeps the tensors that it is given
        for source, pattern, part in place.sources:
            future: Future[Tensor] = Future()  # converters take futures
            future.set_result(_read(part))
            if not _is_finite(future.result()):
                raise _not_finite_error(part)
            converter.add_tensor(place.first, source, pattern, future)
        made = converter.convert(place.first, model=self._model, config=self._model.config)[name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        self._check(name, tensor, tuple(whole.shape))
        return whole

    def fill(
        self, module: nn.Module, dtype: torch.dtype | None = None, exclude: nn.Module | None = None
    ) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Read a module's parameters into it.

        Args:
            module: The model or a part of it; its parameters are replaced.
            dtype: Dtype of the parameters; None for the stored one.
            exclude: A part of the module whose parameters are not read.

        Returns:
            For each replaced parameter: the module that owns it, its name there, and the parameter before.
        """
        made: dict[Tensor, nn.Parameter] = {}
        replaced = []
        excluded = set() if exclude is None else set(exclude.modules())
        for owner in (owner for owner in module.modules() if owner not in excluded):
            for name, tensor in list(owner.named_parameters(recurse=False)):
                if tensor not in made:
                    made[tensor] = nn.Parameter(self.read(tensor).to(dtype), requires_grad=False)
                setattr(owner, name, made[tensor])
                replaced.append((owner, name, tensor))
        return replaced

    @contextlib.contextmanager
    def loaded(
        self, module: nn.Module, dtype: torch.dtype, exclude: nn.Module | None = None
    ) -> Iterator[None]:
        """Hold a module's parameters in memory, as `fill` reads them, while the block runs."""
        replaced = self.fill(module, dtype, exclude)
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


def _locate(model: Any, tensors: dict[str, Tensor], stored: Mapping[str, TensorSource]) -> dict[str, _Place]:
    """Return the locations of the model's tensors, by their names in the model.

    Stored tensors that the model does not have are left out.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    places: dict[str, _Place] = {}
    parts: dict[str, list[tuple[str, str, TensorSource]]] = {}
    # Experts are stacked in the order of their numbers, as transformers sorts them.
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
    """Return a sort key for a name by which its numeric parts are compared as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _tied_sources(model: Any, places: Collection[str]) -> dict[str, str]:
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


def _tie(model: Any, tensors: dict[str, Tensor], places: dict[str, _Place], tied: Mapping[str, str]) -> None:
    """Replace each parameter that is not stored by the stored one that it is tied to."""
    for name, source in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensors[source])
        tensors[name], places[name] = tensors[source], places[source]


def _read(place: TensorSource) -> Tensor:
    """Read or compute one tensor into newly allocated memory."""
    if isinstance(place, ComputedTensor):
        return place.compute([_read(source) for source in place.sources]).to(_DTYPES[place.dtype])
    values = torch.empty(place.length, dtype=torch.uint8)
    left = values.numpy().data
    with place.file.open("rb", buffering=0) as file:  # opened anew, because threads read in parallel
        file.seek(place.offset)
        while left and (count := file.readinto(left)):
            left = left[count:]
    if left:
        raise CheckpointError(
            f"The weight file {place.file} became shorter while it was read.", "Download it again."
        )
    elements = values.view(_DTYPES[place.dtype])
    if place.strides is None:
        return elements.reshape(place.shape)
    return elements.as_strided(place.shape, place.strides).contiguous()


def _is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; it is checked in chunks."""
    parts = tensor.flatten().split(_CHUNK) if tensor.is_floating_point() else ()
    return all(bool(part.isfinite().all()) for part in parts)


def _not_finite_error(place: TensorSource) -> CheckpointError:
    return CheckpointError(
        f"The tensor {place.name} in {place.file} holds NaN or infinity.",
        "The model cannot compute with it: take weights that were saved before that happened.",
    )


def _stored_parts(place: _Place) -> tuple[TensorSource, ...]:
    """Return the tensors of the checkpoint from which a tensor of the model is made."""
    return tuple(part for _, _, part in place.sources) if isinstance(place, _Converted) else (place,)
