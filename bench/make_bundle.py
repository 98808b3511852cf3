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
    parts = part_options(source)
    _check_directories(source, parts["adapter"] or [])
    found = find(model, CheckpointOptions(revision=source.revision, **parts), download=False)
    if found.weights_sha256() != source.weights_sha256:
        raise _other_weights(found, source)
    return model, found


def _check_directories(source: Source, adapters: list[str]) -> None:
    """Refuse a model or adapters whose directories are not in the working directory.

    Args:
        source: Of the bundle.
        adapters: Its adapters that do not lie beside the model's weights; hub ids have a slash.
    """
    local = [name for name in adapters if "/" not in name]
    for name in local:
        if local.count(name) > 1:
            raise CheckpointError(
                f"The bundle has several adapters named {name}, and the working directory can have one.",
                "Give their directories different names, and export again.",
            )
    named = [("model", source.model), *(("adapter", name) for name in local)]
    for kind, name in named:
        if "/" not in name and name != DEMO and not Path(name).is_dir():
            raise CheckpointError(
                f"The {kind} of the bundle, {name}, is not in the working directory.",
                "A model and its adapters are looked for there under their names: run the command where they "
                "are, or make links to them.",
            )


def _other_weights(found: Checkpoint, source: Source) -> CheckpointError:
    """Return the error for a checkpoint that has other weights than a bundle, with the part that differs."""
    here = {(part.role, part.name): found.sha256_of(part.files) for part in found.parts}
    for part in source.parts:
        sha256 = here.get((part.role, part.name))
        if sha256 is None:
            return CheckpointError(
                f"The bundle has the {part.role} {part.name}, and {found.path} was found without it.",
                "Put the checkpoint there that the bundle was made from. If that lay in two directories of "
                "one name, give them different names, and export again.",
            )
        if sha256 != part.sha256:
            return CheckpointError(
                f"The {part.role} {part.name} has other weights than that of the bundle.",
                "Put the one there that the bundle was made with.",
            )
    return CheckpointError(
        f"{found.path} has other weights than the bundle of {source.model}.",
        "Put that model's directory there.",
    )


def part_options(source: Source) -> dict[str, Any]:
    """Return the options with which the parts of a bundle's model are found again.

    An adapter that lies beside the model's own weights needs none, and neither does a vision tower whose
    directory the checkpoint names. Such an adapter has the model's name and revision. An adapter in another
    directory of that name has them too, but two such directories are never both in the working directory.
    Pickles are read if they were read for the bundle.

    Args:
        source: Of the bundle.
    """
    own = source.model, source.revision
    others = [part for part in source.parts if (part.name, part.revision) != own]
    return {
        "adapter": [part.name for part in others if part.role == "adapter"] or None,
        "vision_tower": next(
            (part.name for part in others if part.role == "vision tower" and _is_found(part.name)), None
        ),
        "pickled_weights": source.pickled_weights,
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
