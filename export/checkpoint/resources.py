"""What a task needs of this machine, and whether it has it, asked before the task begins."""

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

__all__ = [
    "Memory",
    "available_memory",
    "check_memory",
    "check_resources",
    "free_space",
    "layers_memory",
    "memory",
]

# What PyTorch, transformers and traced graphs take; what NumPy and ONNX Runtime do. Measured on the demo
# model: 0.5 and 0.1 GB.
_EXPORTER, _RUNTIME = 600_000_000, 150_000_000


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes of memory, each at its peak.

    Attributes:
        export: To trace and write the graphs.
        float32: To compute with the model in PyTorch, as the whole self-check and a fit do.
        run: To run the graphs in ONNX Runtime on a CPU.
    """

    export: int
    float32: int
    run: int


def memory(checkpoint: Checkpoint, dtype: str) -> Memory:
    """Estimate what an export needs, by the numbers in the checkpoint and in its largest tensor.

    - The export holds one tensor at a time: as it is read, converted, and transposed.
    - The self-check holds the weights in float32, first PyTorch's and then the decoder's in ONNX Runtime.
    - ONNX Runtime computes in float32 on a CPU, and makes float32 weights of others as it loads them.
    """
    written = 4 if dtype == "float32" else 2
    return Memory(
        export=_EXPORTER + checkpoint.largest * (4 + 2 * written),
        float32=_EXPORTER + checkpoint.elements * 4,
        run=_RUNTIME + checkpoint.elements * 4,
    )


def layers_memory(before_decoder: int) -> int:
    """Estimate what a self-check layer by layer needs: all before the decoder in float32, and room to run.

    Args:
        before_decoder: Numbers in the weights of the vision tower, the projector and the embedding.
    """
    return _EXPORTER + 5 * before_decoder


def free_space(destination: Path) -> int:
    """Bytes free on the disk that would hold a directory."""
    return shutil.disk_usage(existing_parent(destination)).free


def check_resources(
    checkpoint: Checkpoint, dtype: str, destination: Path, asked: bool | Scope, text_type: str
) -> Scope | None:
    """Refuse early what would fail after minutes; else how the decoder is compared with PyTorch.

    It is compared as a whole if memory allows, which only layers do without.

    Args:
        checkpoint: The model.
        dtype: Of the bundle.
        destination: Of the bundle.
        asked: As in `ExportOptions.verify`.
        text_type: Of its decoder.

    Raises:
        ExportError: The disk cannot hold the weights, of which nearly all are exported, or the memory the
            self-check that was asked for.
        UnsupportedError: Layers were asked for, and are not known to have Llama's form.
    """
    needed, free = checkpoint.elements * (4 if dtype == "float32" else 2), free_space(destination)
    if free < needed:
        raise ExportError(
            f"The bundle needs about {needed / 1e9:.1f} GB, and {existing_parent(destination)} has "
            f"{free / 1e9:.1f} GB free.",
            "Free some space, or choose another disk with -o.",
        )
    if asked is False:
        return None
    by_layers = text_type in DECODERS
    if asked == "layers" and not by_layers:
        raise UnsupportedError(
            f"The layers of the decoder {text_type!r} cannot be compared one by one.",
            "Compare all of it with --verify whole, or nothing with --no-verify.",
        )
    if asked == "layers" or (asked is True and by_layers and not _fits(checkpoint)):
        return "layers"
    instead = "compare layer by layer with --verify layers" if by_layers else "do without with --no-verify"
    check_memory(checkpoint, "self-check", instead)
    return "whole"


def check_memory(checkpoint: Checkpoint, what: str, instead: str) -> None:
    """Refuse what would be killed half-way, because it holds the weights in float32.

    Args:
        checkpoint: The model.
        what: That needs the memory.
        instead: What to do where there is no larger machine.

    Raises:
        ExportError: Less is free than the weights take.
    """
    if not _fits(checkpoint):
        needed, available = memory(checkpoint, "float32").float32, available_memory() or 0
        raise ExportError(
            f"The {what} needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free.",
            f"Take a machine with more memory, or {instead}.",
        )


def _fits(checkpoint: Checkpoint) -> bool:
    """Whether memory holds the weights in float32; yes, where nobody says how much there is."""
    available = available_memory()
    return available is None or available >= memory(checkpoint, "float32").float32
