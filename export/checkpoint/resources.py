"""Estimates of the memory and disk space that a task needs, checked before the task begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from visprune.cores import available_memory
from visprune.errors import ExportError, UnsupportedError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.models import DECODERS
from visprune.manifest import Scope
from visprune.staging import existing_parent
from visprune.units import ITEM_SIZE

__all__ = [
    "Memory",
    "available_memory",
    "check_memory",
    "check_resources",
    "free_space",
    "layers_memory",
    "memory",
]

# Bytes that PyTorch, transformers and the traced graphs take, and bytes that NumPy and ONNX Runtime take. On
# the demo model 0.5 and 0.1 GB were measured.
_EXPORTER, _RUNTIME = 600_000_000, 150_000_000


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated peak memory in bytes.

    Attributes:
        export: Peak of tracing and writing the graphs.
        float32: Peak of computing with the model in PyTorch, as the whole self-check and a fit do.
        run: Peak of running the graphs in ONNX Runtime on a CPU.
    """

    export: int
    float32: int
    run: int


def memory(checkpoint: Checkpoint, dtype: str) -> Memory:
    """Estimate the memory of an export from the elements of the checkpoint and of its largest tensor.

    - The export holds one tensor at a time, in three copies: as stored, converted, and transposed.
    - The self-check holds the weights in float32: first in PyTorch, and then the decoder's in ONNX Runtime.
    - On a CPU, ONNX Runtime computes in float32 and converts all weights to it when it loads them.

    Args:
        checkpoint: The model.
        dtype: Dtype of the bundle, "float32" or "float16".
    """
    written = ITEM_SIZE[dtype]
    return Memory(
        export=_EXPORTER + checkpoint.largest * (4 + 2 * written),
        float32=_EXPORTER + checkpoint.elements * 4,
        run=_RUNTIME + checkpoint.elements * 4,
    )


def layers_memory(before_decoder: int) -> int:
    """Estimate the memory in bytes of a self-check layer by layer.

    It holds everything before the decoder in float32, and needs some more to run it.

    Args:
        before_decoder: Number of elements in the weights of the vision tower, the projector and the
            embedding.
    """
    return _EXPORTER + 5 * before_decoder


def free_space(destination: Path) -> int:
    """Return the free bytes of the disk that would hold a directory."""
    return shutil.disk_usage(existing_parent(destination)).free


def check_resources(
    checkpoint: Checkpoint, dtype: str, destination: Path, verify: bool | Scope, text_type: str
) -> Scope | None:
    """Refuse an export that would run out of disk space or memory; choose how the decoder is compared.

    Unless the user chose otherwise, the decoder is compared with PyTorch as a whole if memory holds it, and
    else layer by layer.

    Args:
        checkpoint: The model.
        dtype: Dtype of the bundle, "float32" or "float16".
        destination: Directory of the bundle.
        verify: The user's choice; see `ExportOptions.verify`.
        text_type: The `model_type` of the decoder.

    Returns:
        How the decoder is to be compared; None for no comparison.

    Raises:
        ExportError: The disk cannot hold the weights, or memory cannot hold what the self-check needs.
        UnsupportedError: A comparison layer by layer was asked for, and the decoder's layers are not known to
            have Llama's form.
    """
    needed, free = checkpoint.elements * ITEM_SIZE[dtype], free_space(destination)
    if free < needed:
        raise ExportError(
            f"The bundle needs about {needed / 1e9:.1f} GB, and {existing_parent(destination)} has "
            f"{free / 1e9:.1f} GB free.",
            "Free some space, or choose another disk with -o.",
        )
    if verify is False:
        return None
    by_layers = text_type in DECODERS
    if verify == "layers" and not by_layers:
        raise UnsupportedError(
            f"The layers of the decoder {text_type!r} cannot be compared one by one.",
            "Compare all of it with --verify whole, or nothing with --no-verify.",
        )
    if verify == "layers" or (verify is True and by_layers and not _fits_in_float32(checkpoint)):
        return "layers"
    instead = "compare layer by layer with --verify layers" if by_layers else "do without with --no-verify"
    check_memory(checkpoint, "self-check", instead)
    return "whole"


def check_memory(checkpoint: Checkpoint, what: str, instead: str) -> None:
    """Refuse a task whose float32 weights do not fit into memory, so that it is not killed half-way.

    Args:
        checkpoint: The model.
        what: Name of the task, for the message.
        instead: What the user can do without a larger machine, for the message.

    Raises:
        ExportError: Less memory is free than the weights take.
    """
    if not _fits_in_float32(checkpoint):
        needed, available = memory(checkpoint, "float32").float32, available_memory() or 0
        raise ExportError(
            f"The {what} needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free.",
            f"Take a machine with more memory, or {instead}.",
        )


def _fits_in_float32(checkpoint: Checkpoint) -> bool:
    """Return whether free memory holds the weights in float32; assume so if the system does not tell."""
    available = available_memory()
    return available is None or available >= memory(checkpoint, "float32").float32
