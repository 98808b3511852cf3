"""The weights of a checkpoint, each read from its file when it is needed and not kept.

Files are read and not memory-mapped: a mapped page counts as memory of this process until it is unmapped, and
a shard has gigabytes of them. Names on disk are translated to names in the module tree by transformers' own
rules, so checkpoints of older versions are read as transformers reads them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visprune.errors import CheckpointError, UnsupportedError, VispruneError
from visprune.export.checkpoint.merging import merge
from visprune.export.checkpoint.places import (
    Converted,
    ModelNames,
    Place,
    stored_parts,
    tie,
    tied_sources,
)
from visprune.export.files import tensor_names
from visprune.export.files.stored import ComputedTensor, TensorSource
from visprune.export.formats.adapters import Adapter

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


def stored_dtype(stored: Mapping[str, TensorSource]) -> torch.dtype:
    """Return the dtype of a checkpoint's first floating-point tensor; float32 if there is none."""
    dtypes = [_DTYPES[tensor.dtype] for tensor in stored.values()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


class Weights:
    """The values of a model's parameters, read from the checkpoint's files on demand.

    The model has its parameters on the meta device and its buffers in memory. Wrappers around its modules
    share its parameters under other names, so a parameter is identified by its tensor and not by its name.

    Several sets of names are tried (see `tensor_names.name_variants`). Among those with which nothing is
    missing, the one that leaves the fewest stored tensors unexpected is taken. A parameter that no visual
    token depends on may be missing, or hold NaN or infinity: it is read as zeros.

    Args:
        model: A `PreTrainedModel`. Tied parameters of which only one is stored become one parameter.
        stored: The checkpoint's tensors, by their names on disk.
        where: The checkpoint, for messages.
        unused: Returns the names of parameters that need not be stored; called only if some are missing or
            not finite.
        adapters: Adapters that are merged into the weights, in this order.

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
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._model = model
        self._where = where
        self._unused = cache(unused)
        self._adapters = adapters
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        places, self.unexpected = self._find(tensors, stored)
        self._places = {tensors[name]: (name, place) for name, place in places.items()}
        self._absent = {tensor for tensor in tensors.values() if tensor not in self._places}
        for name, place in places.items():
            if not isinstance(place, Converted):
                self._check(name, tensors[name], place.shape)
        for tensor in tensors.values():
            if not tensor.is_meta and tensor not in self._absent:  # a stored buffer
                tensor.copy_(self.read(tensor))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the weights that a user should read."""
        return tensor_names.unexpected_note(self.unexpected)

    def _find(
        self, tensors: dict[str, Tensor], stored: Mapping[str, TensorSource]
    ) -> tuple[dict[str, Place], list[str]]:
        """Locate each tensor of the model, merge adapters, and tie the parameters of which one is stored.

        Returns:
            The location of each tensor, and the names on disk of those that the model does not have.
        """
        fitting: list[tuple[dict[str, Place], dict[str, str], set[str]]] = []
        known = {tensor.name for tensor in stored.values()}
        failures: list[VispruneError] = []
        for base in tensor_names.name_variants(stored):
            places = ModelNames(self._model, tensors).locate(base)
            tied = tied_sources(self._model, places)
            unexpected = known - {part.name for place in places.values() for part in stored_parts(place)}
            if self._adapters:
                try:
                    merged = merge(self._model, tensors, base, tied, self._adapters, self._where)
                except UnsupportedError as error:
                    failures.append(error)
                    continue
                places = ModelNames(self._model, tensors).locate(merged)
                tied = tied_sources(self._model, places)
            missing = tensors.keys() - places.keys() - tied.keys()
            if missing:
                missing -= set(self._unused())
            if missing:
                failures.append(tensor_names.missing_error(self._where, missing, places, unexpected))
            else:
                fitting.append((places, tied, unexpected))
        if not fitting:
            raise failures[0]
        places, tied, unexpected = min(fitting, key=lambda one: len(one[2]))
        tie(self._model, tensors, places, tied)
        return places, sorted(unexpected)

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
        if not isinstance(place, Converted):
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
    """Return the error of a tensor that holds NaN or infinity, or of that of its sources which does."""
    sources = place.sources if isinstance(place, ComputedTensor) else ()
    for source in sources:
        if not _is_finite(_read(source)):
            return _not_finite_error(source)
    files = " and ".join(dict.fromkeys(str(source.file) for source in sources)) or place.file
    return CheckpointError(
        f"The tensor {place.name} {'made of' if sources else 'in'} {files} holds NaN or infinity.",
        "The model cannot compute with it: take weights that were saved before that happened.",
    )
