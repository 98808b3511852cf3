"""Merging of adapters into the tensors of a checkpoint.

No value is read here. A changed tensor becomes one that is computed whenever it is read, in float32 and a few
rows at a time, so that merging needs hardly more memory than reading.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from visprune.bundled import MODEL_DIR
from visprune.errors import UnsupportedError
from visprune.export.checkpoint.places import ModelNames
from visprune.export.files.stored import ComputedTensor, TensorSource
from visprune.export.formats import llava_hr
from visprune.export.formats.adapters import Adapter
from visprune.export.formats.lora import BiasChange, LowRankChange
from visprune.export.formats.original_names import known_name

__all__ = ["merge"]

_CHUNK = 1 << 21  # elements that are changed at once: 8 MB in float32, of which a few copies are held
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # with a row for each token of the vocabulary


def merge(
    model: Any,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, TensorSource],
    tied: Mapping[str, str],
    adapters: Sequence[Adapter],
    where: Path,
) -> dict[str, TensorSource]:
    """Return the tensors of a checkpoint with adapters merged.

    Args:
        model: A `PreTrainedModel`.
        tensors: Its tensors by their names, of which only shapes are used.
        stored: The checkpoint's tensors, by their names on disk.
        tied: For each parameter that is not stored, the name of a stored one that it is tied to. If an
            adapter changes one of them, the other keeps its values, as it did while the adapter was trained.
        adapters: The adapters, in the order in which they are merged.
        where: The checkpoint, for messages.

    Raises:
        UnsupportedError: An adapter does not fit the model, or adapters contradict each other.
    """
    names = ModelNames(model, tensors)
    keys = {names.name_of(key): key for key in stored}  # by the names in the model
    known = keys.keys() | tensors.keys()
    edits = [
        (adapter, _name(adapter, target, model, names, known, where), edit)
        for adapter in adapters
        for target, edit in adapter.edits
    ]
    merged = dict(stored)
    changed = {name for _, name, _ in edits}
    for name, source in tied.items():
        if changed & {name, source}:
            keys[name], merged[name] = name, stored[keys[source]]
    before: dict[str, list[tuple[Adapter, bool]]] = {}
    for adapter, name, edit in edits:
        replaces = not isinstance(edit, LowRankChange | BiasChange)
        for other, replaced in before.setdefault(name, []):
            if (replaces and replaced) or (other is not adapter and (replaces or replaced)):
                raise _contradiction(other, adapter, name)
        before[name].append((adapter, replaces))
        if name not in keys and not replaces:
            continue  # the weights lack it, which is an error of its own
        shape = tuple(tensors[name].shape) if name in tensors else merged[keys[name]].shape
        key = keys.setdefault(name, name)
        if isinstance(edit, LowRankChange):
            transposed = edit.embedding or _is_transposed(model, name)
            merged[key] = _changed(adapter, name, edit, merged[key], where, transposed=transposed)
        elif isinstance(edit, BiasChange):
            _check(adapter, name, edit.bias.shape, shape, where)
            add = partial(_add_bias, scale=edit.scale)
            merged[key] = ComputedTensor(merged[key].name, (merged[key], edit.bias), shape, add)
        else:
            _check(adapter, name, edit.shape, shape, where)
            merged[key] = edit
    return merged


def _name(
    adapter: Adapter, target: str, model: Any, names: ModelNames, known: Collection[str], where: Path
) -> str:
    """Return the name that a tensor has in the model, from the name that an adapter gives it."""
    spellings = [target, known_name(target)]
    vision = model.config.vision_config
    if vision.model_type == llava_hr.MODEL_TYPE:
        spellings.append(llava_hr.known_name(target, vision.num_hidden_layers))
    for spelled in spellings:
        if (name := names.name_of(spelled)) in known:
            return name
    ending = target.rpartition(".")[2]
    alike = difflib.get_close_matches(target, [name for name in known if name.endswith(ending)], 1, 0)
    nearest = f"; the nearest that it has is {alike[0]}" if alike else ""
    raise UnsupportedError(
        f"The adapter {adapter.name} changes {target}, which {where} does not have{nearest}.",
        _hint(adapter, where),
    )


def _changed(
    adapter: Adapter, name: str, change: LowRankChange, base: TensorSource, where: Path, *, transposed: bool
) -> ComputedTensor:
    """Return a weight with a change added, which is transposed for an embedding, for instance."""
    shape = (change.up.shape[0], *change.down.shape[1:])
    _check(adapter, name, shape[::-1] if transposed else shape, base.shape, where)
    sources = [base, change.down, change.up]
    if change.magnitude is not None:
        _check(adapter, f"the magnitude of {name}", (change.magnitude.elements,), shape[:1], where)
        sources.append(change.magnitude)
    add = partial(_add_low_rank, scale=change.scale, transposed=transposed)
    return ComputedTensor(base.name, tuple(sources), base.shape, add)


def _add_low_rank(values: Sequence[Tensor], scale: float, *, transposed: bool) -> Tensor:
    """Add s B A to a weight in place, and scale its outputs' vectors to learnt lengths if there are any.

    With lengths m it is DoRA: m (W + s B A) / |W + s B A|, where the norm is that of each output's weights
    (arXiv 2402.09353, equation 5).

    Args:
        values: W [outputs, ...], A [r, ...], B [outputs, r, ...] and, for DoRA, m with a number for each
            output.
        scale: s.
        transposed: Whether W is [inputs, outputs].
    """
    weight, down, up, *lengths = values
    down, up = down.flatten(1).float(), up.flatten(1)  # [r, inputs], [outputs, r]
    left, right = (down.T, up.float().T) if transposed else (up, down)
    weight = weight.contiguous()
    rows = weight.flatten(1)  # the same memory
    step = max(1, _CHUNK // rows.shape[1])
    parts = [slice(begin, begin + step) for begin in range(0, len(rows), step)]

    def sums(part: slice) -> Tensor:
        return torch.addmm(rows[part].float(), left[part].float(), right, alpha=scale)

    if not lengths:
        for part in parts:
            rows[part] = sums(part)
    elif transposed:
        squares = torch.zeros(rows.shape[1], dtype=torch.float64)  # [outputs]
        for part in parts:
            squares += sums(part).square().sum(0)
        factor = lengths[0].float().flatten() / squares.sqrt().float()
        for part in parts:
            rows[part] = sums(part) * factor
    else:
        for part in parts:
            new = sums(part)
            rows[part] = new.mul_(lengths[0].float().reshape(-1, 1)[part] / new.norm(dim=1, keepdim=True))
    return weight


def _add_bias(values: Sequence[Tensor], scale: float) -> Tensor:
    bias, change = values
    return bias.float() + scale * change.float()


def _is_transposed(model: Any, name: str) -> bool:
    """Return whether the weight of a module is [inputs, outputs], as GPT-2 has it."""
    try:
        return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
    except AttributeError:  # a module of an older version, whose weights are stacked
        return False


def _check(adapter: Adapter, name: str, shape: tuple[int, ...], wanted: tuple[int, ...], where: Path) -> None:
    if tuple(shape) == tuple(wanted):
        return
    hint = _hint(adapter, where)
    if name.endswith(_TABLES) and tuple(shape[1:]) == tuple(wanted[1:]):
        hint = (
            "The vocabulary had another size when the adapter was trained. Save the base with "
            f"resize_token_embeddings({shape[0]}) and the adapter's tokenizer, and give that as the model."
        )
    raise UnsupportedError(
        f"The adapter {adapter.name} does not fit {where}: for {name} it has {list(shape)}, and the "
        f"model {list(wanted)}.",
        hint,
    )


def _hint(adapter: Adapter, where: Path) -> str:
    hint = f"Give the model that it was trained on{f', {adapter.base}' if adapter.base else ''}."
    if where == MODEL_DIR:
        return f"That is the demo model, which is taken if no MODEL is given. {hint}"
    return hint


def _contradiction(one: Adapter, other: Adapter, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"The adapters {one.name} and {other.name} contradict each other: both change {name}, and not only "
        "by adding to it.",
        "Leave one of them out.",
    )
