"""The export of a checkpoint to a bundle, in the order of its steps.

Everything is checked before the weights are read. The bundle is written in a staging directory, which is
renamed when it is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visprune.bundle import Bundle
from visprune.export.checkpoint.checkpoint import Checkpoint, short_name
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.resources import check_resources
from visprune.export.duration import expected
from visprune.export.export_job import ExportJob
from visprune.export.export_options import ExportOptions, Methods
from visprune.manifest import MANIFEST
from visprune.optional import require
from visprune.progress import Progress, no_progress
from visprune.pruning.base import LayerPruner, VisionPruner
from visprune.pruning.keep_all import KeepAll
from visprune.staging import check_destination, existing_parent, staged, tidy
from visprune.targets import DTYPES
from visprune.targets import target as find_target

__all__ = ["ExportOptions", "export", "prepare", "run"]

Announce = Callable[[str], None]

_log = logging.getLogger(__name__)


def export(
    model: str | Path | None = None,
    *,
    method: str | VisionPruner | LayerPruner,
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
        **options: The other fields of `ExportOptions`.

    Raises:
        UsageError: Options that make no sense, or an output that exists.
        CheckpointError: The checkpoint is missing or broken.
        UnsupportedError: The model, or the method on this model, cannot be exported.
        ParityError: The graphs do not compute what PyTorch computes.
        ExportError: The disk is full.
        MissingExtraError: torch or another package of the `export` extra is missing.
    """
    return run(model, output, ExportOptions(method=method, **options), progress)


def run(
    model: str | Path | None,
    output: str | Path | None,
    options: ExportOptions,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Bundle:
    """Do what `export` does, with its options as one value.

    Args:
        model: As `export` takes it.
        output: As `export` takes it.
        options: Everything else that a user may ask for.
        progress: Called as the work goes on.
        announce: Called before the first long step, with a sentence on how long the export will take.
    """
    job, destination = prepare(model, output, options, progress, announce)
    with staged(destination) as folder:
        job.write(folder)
    return Bundle.open(destination)


def prepare(
    model: str | Path | None,
    output: str | Path | None,
    settings: ExportOptions,
    progress: Progress | None = None,
    announce: Announce | None = None,
    *,
    dry: bool = False,
) -> tuple[ExportJob, Path]:
    """Make every decision of an export, or refuse it; return what is left to do, and the directory to make.

    Args:
        model: As `export` takes it.
        output: As `export` takes it.
        settings: The other options.
        progress: Called as the work goes on.
        announce: As `run` takes it.
        dry: For a dry run: nothing is written or downloaded and no weight is read. A recipe is not fitted
            then, and a lack of memory or space is no error.
    """
    methods, target = settings.methods(), find_target(settings.target)
    if output is not None:
        check_destination(Path(output), force=settings.force, marker=MANIFEST)
    checkpoint = find(model, settings, download=not dry)
    for module in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export")
    if settings.verify:
        require("onnxruntime", extra="cpu")
    from visprune.export import models
    from visprune.export.checkpoint import loading, processors
    from visprune.export.checkpoint.pixels import check_pixels
    from visprune.export.graph import weightless
    from visprune.export.inside_llm import decide
    from visprune.export.scope import check_room, pruning_for

    loading.silence_transformers()

    config = loading.load_config(checkpoint)
    features = models.family(checkpoint.model_type).features(config)
    pruning = pruning_for(methods, features, settings.anyres_scope)
    keep = pruning.keep_tokens
    text = config.text_config
    check_room(pruning, features, loading.context_limit(text), loading.sliding_window(text))
    progress = progress or no_progress
    progress("loading the checkpoint", 0, 1)
    processor = processors.load_processor(checkpoint, config)
    check_pixels(processor, features)
    model, weights = weightless.open_model(checkpoint)
    progress("loading the checkpoint", 1, 1)
    destination = Path(output) if output is not None else Path(_name(checkpoint, settings, methods, keep))
    if not dry:
        notes = (*checkpoint.notes, *processor.notes, *weights.notes)
        for said in (*tidy(existing_parent(destination)), *notes):
            _log.warning(said)
    check_destination(destination, force=settings.force, marker=MANIFEST)
    dtype = DTYPES[settings.dtype] if settings.dtype else target.dtype
    scope = None
    if not dry:
        scope = check_resources(checkpoint, dtype, destination, settings.verify, text.model_type)
        if announce is not None:
            announce(expected(checkpoint, scope, fits=settings.needs_fit(methods)))
    inside = decide(methods, settings, checkpoint, config, features, keep, None if dry else progress)
    if not dry:
        for said in inside.notes:
            _log.warning(said)
    job = ExportJob(
        checkpoint=checkpoint,
        config=config,
        features=features,
        processor=processor,
        model=model,
        weights=weights,
        pruner=methods.before,
        pruning=pruning,
        inside=inside,
        target=target,
        dtype=dtype,
        scope=scope,
        progress=progress,
    )
    return job, destination


def _name(checkpoint: Checkpoint, settings: ExportOptions, methods: Methods, keep: int) -> str:
    """Return the default name of the bundle: model, adapters, methods with their budgets, target."""
    parts = [checkpoint.short_name]
    parts += [short_name(one.name) for one in checkpoint.adapters if one.name != checkpoint.name]
    if methods.inside is None or not isinstance(methods.before, KeepAll):
        parts.append(methods.before_asked.name)
        asked = methods.before_asked
        prunes = asked.keep_tokens is not None or asked.ratio not in (None, 1.0)
        parts += [f"keep{keep}"] if prunes else []
        parts += ["global"] if settings.anyres_scope == "global" else []
    if methods.inside_asked is not None:
        asked = methods.inside_asked
        parts.append(asked.name)
        parts += [f"keep{asked.keep_tokens}"] if asked.keep_tokens is not None else []
        parts += [f"{asked.ratio:g}"] if asked.ratio is not None else []
    parts += [f"segments{settings.segments}"] if settings.segments is not None else []
    parts += [settings.target] if settings.target != "onnxruntime" else []
    return "-".join(parts)
