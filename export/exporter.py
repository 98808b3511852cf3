"""The export, from a checkpoint to a bundle, in the order it happens.

Whatever can be refused is refused before the weights are read; everything is written in a staging
directory; the last step is a rename.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from visprune.budget import check_ratio
from visprune.bundle import MANIFEST, Bundle, Pruning
from visprune.errors import ExportError, UnsupportedError, UsageError
from visprune.export.checkpoint import Checkpoint, find
from visprune.export.job import Job, Progress
from visprune.export.targets import target as find_target
from visprune.optional import require
from visprune.pruning.base import VisionPruner
from visprune.registry import load_method, method_name
from visprune.staging import check_destination, existing_parent, staged

__all__ = ["ExportOptions", "export"]

_DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, checked as far as that is possible without the model.

    Attributes:
        method: Name of a pruning method, or an instance of one with its own knobs.
        ratio: Fraction of visual tokens kept, in (0, 1].
        keep_tokens: Visual tokens kept of one image, instead of a ratio.
        target: Platform, see `export.targets`.
        dtype: "fp32" or "fp16"; the target's own if None.
        verify: Whether to compare the graphs with PyTorch.
        force: Whether an existing bundle may be replaced.
    """

    method: str | VisionPruner
    ratio: float | None = None
    keep_tokens: int | None = None
    target: str = "onnxruntime"
    dtype: Literal["fp32", "fp16"] | None = None
    verify: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None and self.keep_tokens is not None:
            raise UsageError("Both a ratio and a number of tokens were given.", "Give one of them.")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise UsageError(f"There is no dtype {self.dtype!r}.", "Use fp32 or fp16.")

    def pruner(self) -> VisionPruner:
        """The method."""
        return load_method(self.method)() if isinstance(self.method, str) else self.method


def export(
    model: str | Path | None = None,
    *,
    method: str | VisionPruner,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Export a checkpoint with a pruning method into a new bundle.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        method: Name of a pruning method, or an instance of one.
        output: The directory to make; by default named after model, method and budget.
        progress: Called as the work goes on.
        **options: The other fields of `ExportOptions`: ratio, keep_tokens, target, dtype, verify, force.

    Raises:
        UsageError: Options that make no sense, or an output that exists.
        CheckpointError: The checkpoint is missing or broken.
        UnsupportedError: The model, or the method on this model, cannot be exported.
        ParityError: The graphs do not compute what PyTorch computes.
        ExportError: The disk is full.
        MissingExtraError: torch or another package of the `export` extra is missing.
    """
    settings = ExportOptions(method=method, **options)
    pruner, target = settings.pruner(), find_target(settings.target)
    if output is not None:
        check_destination(Path(output), force=settings.force, marker=MANIFEST)
    checkpoint = find(model)
    for module in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export")
    if settings.verify:
        require("onnxruntime", extra="cpu")
    _quiet_transformers()
    from visprune.export import loading, models

    config = loading.load_config(checkpoint)
    features = models.family(checkpoint.model_type).features(config)
    if pruner.signals and max(features.layer_counts) == 0:
        raise UnsupportedError(
            "This model takes the patch embeddings as features: there is no attention layer to score with.",
            "Use a method without scores: uniform or random.",
        )
    budget = pruner.budget(features.layout)
    if settings.keep_tokens is not None:
        keep = budget.from_tokens(settings.keep_tokens)
    else:
        keep = budget.from_ratio(1.0 if settings.ratio is None else settings.ratio)
    name = method if isinstance(method, str) else method_name(type(pruner))
    suffix = "" if target.name == "onnxruntime" else f"-{target.name}"
    kept = "" if keep == budget.visual_tokens else f"-keep{keep}"
    destination = (
        Path(output) if output is not None else Path(f"{checkpoint.short_name}-{name}{kept}{suffix}")
    )
    check_destination(destination, force=settings.force, marker=MANIFEST)
    job = Job(
        checkpoint=checkpoint,
        config=config,
        features=features,
        pruner=pruner,
        pruning=Pruning(
            method=name,
            options={f.name: getattr(pruner, f.name) for f in fields(pruner)} if is_dataclass(pruner) else {},
            keep_tokens=keep,
            budget=budget,
            grid=(features.side, features.side),
            grid_offset=features.skipped_patches,
            always_kept=features.always_kept,
            positions=pruner.positions,
        ),
        target=target,
        dtype=_DTYPES[settings.dtype] if settings.dtype else target.dtype,
        progress=progress or (lambda what, done, total: None),
    )
    _check_space(checkpoint, job.dtype, destination)
    if settings.verify:
        _check_memory(checkpoint)
    with staged(destination) as folder:
        job.write(folder, verify=settings.verify)
    return Bundle.open(destination)


def _quiet_transformers() -> None:
    """Its notes on processors and kernels are not the user's concern; its errors still show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check_space(checkpoint: Checkpoint, dtype: str, destination: Path) -> None:
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


def _check_memory(checkpoint: Checkpoint) -> None:
    """Refuse a self-check that would be killed half-way: it computes in float32, on either side."""
    needed, available = checkpoint.elements * 4, _available_memory()
    if available is not None and available < needed:
        raise ExportError(
            f"The self-check needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free.",
            "Export on a machine with more memory, or leave the check out with --no-verify.",
        )
