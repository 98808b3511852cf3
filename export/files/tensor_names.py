"""Names of a checkpoint's tensors: those that wrappers changed, those that are missing, and odd ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from visprune.errors import CheckpointError

__all__ = ["missing_error", "name_variants", "unexpected_note", "unwrapped"]

T = TypeVar("T")

# Parts that wrappers add inside tensor names: torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Prefixes that PEFT and DataParallel put in front of tensor names.
_PREFIXES = ("base_model.model.", "module.")


def name_variants(stored: Mapping[str, T]) -> list[dict[str, T]]:
    """Return the tensors under each set of names that they may have in the model.

    The first set is the names as they are stored. The second is without the parts that wrappers added; the
    third is also without the beginning that all names share. A set in which two tensors would have one name
    is left out, as is one that was given already.
    """
    plain = {name: unwrapped(name) for name in stored}
    parts = [name.split(".")[:-1] for name in plain.values()]
    begin = "".join(f"{part}." for part in _common_beginning(parts))
    found = [dict(stored)]
    for names in (plain, {name: short.removeprefix(begin) for name, short in plain.items()}):
        spelled = {names[name]: tensor for name, tensor in stored.items()}
        if len(spelled) == len(stored) and spelled.keys() not in [one.keys() for one in found]:
            found.append(spelled)
    return found


def _common_beginning(parts: list[list[str]]) -> list[str]:
    """Return the longest list that all lists begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return [column[0] for column in same]


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts and prefixes that wrappers added."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def missing_error(
    where: Path, missing: Collection[str], known: Collection[str], unexpected: Collection[str]
) -> CheckpointError:
    """Return the error for weights that lack tensors of the model.

    Args:
        where: The checkpoint.
        missing: Names of the model's tensors that are not stored.
        known: Names of the model's tensors that are stored.
        unexpected: Names of stored tensors that the model does not have.
    """
    first = min(missing)
    what = f"The weights of {where} lack {len(missing)} of {len(missing) + len(known)} tensors: {first}"
    what += " is one of them" if len(missing) > 1 else ""
    if odd := _without_buffers(unexpected):
        return CheckpointError(
            f"{what}; they have {len(odd)} that the model does not, such as {min(odd)}.",
            "Take the weights that belong to this config.json. If names alone differ, rename the tensors.",
        )
    if first == "lm_head.weight" and "model.language_model.embed_tokens.weight" in known:
        return CheckpointError(
            f"{what}.",
            "If the embedding is the head too, set tie_word_embeddings in config.json; else add the tensor.",
        )
    return CheckpointError(
        f"{what}.", "Take the weights that belong to this config.json, with every part of the model in them."
    )


def unexpected_note(unexpected: Collection[str]) -> tuple[str, ...]:
    """Return a note on stored tensors that the model does not have, or nothing."""
    odd = _without_buffers(unexpected)
    if not odd:
        return ()
    return (
        f"The weights have {len(odd)} tensors that the model of config.json does not, such as {min(odd)}; "
        "they are not exported.",
    )


def _without_buffers(names: Collection[str]) -> list[str]:
    """Return names of tensors without those of buffers that older versions of transformers stored."""
    return [name for name in names if not name.endswith(("position_ids", "inv_freq"))]
