"""Bundles for a comparison, exported from the checkpoint of another bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.bundle import Bundle
from visprune.bundled import DEMO
from visprune.errors import CheckpointError
from visprune.progress import Progress
from visprune.targets import WIDTHS, target

if TYPE_CHECKING:
    from visprune.export.checkpoint.checkpoint import Checkpoint
    from visprune.manifest import Manifest, Source

__all__ = ["chat_template", "checkpoint_of", "export_variant", "part_options"]


def checkpoint_of(manifest: Manifest) -> tuple[str | None, Checkpoint]:
    """Find the model that a bundle was exported from.

    A manifest names a directory without its path, so the directory is looked for in the working directory; a
    hub id is looked for in the hub's cache. That holds for its adapters and vision tower too. A checkpoint
    whose weights have another hash is refused.

    Returns:
        The model as `export` takes it, and its checkpoint.

    Raises:
        CheckpointError: It cannot be found, or has other weights.
        MissingExtraError: The `export` extra is not installed.
    """
    from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
    from visprune.export.checkpoint.find import find
    from visprune.optional import require

    for package in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
        require(package, extra="export")
    source = manifest.source
    model = None if source.model == DEMO else source.model
    options = CheckpointOptions(revision=source.revision, **part_options(source))
    found = find(model, options, download=False)
    if found.weights_sha256() != source.weights_sha256:
        raise CheckpointError(
            f"{found.path} has other weights than the bundle of {source.model}.",
            "Put that model's directory there.",
        )
    return model, found


def part_options(source: Source) -> dict[str, Any]:
    """Return the options with which the parts of a bundle's model are found again.

    An adapter that lies beside the model's own weights needs none, and neither does a vision tower whose
    directory the checkpoint names. Pickles are read where there is nothing else, because only files with the
    bundle's hash are accepted, and those were read for it.

    Args:
        source: Of the bundle.
    """
    others = [part for part in source.parts if part.name != source.model]
    return {
        "adapter": [part.name for part in others if part.role == "adapter"] or None,
        "vision_tower": next(
            (part.name for part in others if part.role == "vision tower" and _is_found(part.name)), None
        ),
        "pickled_weights": True,
    }


def _is_found(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


def chat_template(bundle: Bundle) -> str | None:
    """Return the path of a bundle's chat template, which may differ from its checkpoint's."""
    name = bundle.manifest.text.chat_template
    return str(bundle.file(name)) if name else None


def export_variant(bundle: Bundle, method: str, folder: Path, progress: Progress, *, engines: bool) -> Bundle:
    """Export a bundle's model again in the same precision, with another method and all tokens kept.

    The new bundle is not compared with PyTorch.

    Args:
        bundle: The bundle.
        method: A method before the LLM.
        folder: Directory to make the new bundle in; its name there is new.
        progress: Called as steps go on.
        engines: Whether to build engines too, for the same kinds of GPU.

    Raises:
        VispruneError: It cannot be made.
    """
    from visprune.engines import build
    from visprune.export import export
    from visprune.quantize import quantize
    from visprune.quantize.quantize_options import FLOAT

    manifest = bundle.manifest
    model, checkpoint = checkpoint_of(manifest)
    place = folder / f"{method}-{len(list(folder.iterdir()))}"
    made = export(
        model,
        method=method,
        output=place,
        target=manifest.target,
        dtype=WIDTHS[manifest.dtype],
        verify=False,
        revision=checkpoint.revision,
        **part_options(manifest.source),
        chat_template=chat_template(bundle),
        progress=progress,
    )
    if manifest.quantization is not None:
        parts: dict[str, Any] = dict(manifest.quantization.parts)
        precision = next(name for name in parts.values() if name != FLOAT)
        quantized = place.with_name(f"{place.name}-quantized")
        made = quantize(made, quantized, precision=precision, timing=False, progress=progress, **parts)
    if engines:
        sms = sorted({engine.sm for engine in manifest.engines}) if target(manifest.target).anywhere else None
        built = place.with_name(f"{place.name}-engines")
        made = build(made, built, target=manifest.target, sm=sms, progress=progress)
    return made
