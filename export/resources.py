"""Whether this machine has what a task needs, asked before the task begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from visprune.errors import ExportError
from visprune.export.checkpoint import Checkpoint
from visprune.staging import existing_parent

__all__ = ["check_memory", "check_space"]


def check_space(checkpoint: Checkpoint, dtype: str, destination: Path) -> None:
    """Refuse early where the disk cannot hold the weights, of which nearly all are exported."""
    parent = existing_parent(destination)
    needed = checkpoint.elements * (4 if dtype == "float32" else 2)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ExportError(
            f"The bundle needs about {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free.",
            "Free some space, or choose another disk with -o.",
        )


def _available_memory() -> int | None:
    """Bytes that could be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def check_memory(checkpoint: Checkpoint, what: str, instead: str) -> None:
    """Refuse what would be killed half-way, because it holds the weights in float32.

    Args:
        checkpoint: The model.
        what: That needs the memory.
        instead: What to do where there is no larger machine.

    Raises:
        ExportError: Less is free than the weights take.
    """
    needed, available = checkpoint.elements * 4, _available_memory()
    if available is not None and available < needed:
        raise ExportError(
            f"The {what} needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free.",
            f"Take a machine with more memory, or {instead}.",
        )
