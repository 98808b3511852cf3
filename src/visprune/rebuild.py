"""The command that exports the model of a bundle again: for another target, or with another method."""

from __future__ import annotations

from visprune.bundled import DEMO
from visprune.errors import UnsupportedError
from visprune.manifest import Manifest
from visprune.targets import TARGETS, WIDTHS, target

__all__ = ["export_command", "refuse_other_target"]


def refuse_other_target(manifest: Manifest, name: str) -> None:
    """Refuse a bundle that was exported for another target.

    Args:
        manifest: Of the bundle.
        name: The target that it is to be built or loaded for.

    Raises:
        UnsupportedError: The bundle is for another target. The hint is the command that makes a fitting one.
    """
    if manifest.target != target(name).name:
        raise UnsupportedError(
            f"This bundle was exported for {manifest.target}, and engines for {name} need its graphs "
            "in another form.",
            f"Export it again: {export_command(manifest, name)}.",
        )


def export_command(manifest: Manifest, name: str | None = None, *, method: str | None = None) -> str:
    """Return the command that exports the model of a bundle again.

    A model that was a directory is written as `MODEL`, an adapter as `ADAPTER`, a vision tower as `TOWER`,
    and a recipe that was fitted as that of `BUNDLE`, because a manifest has no paths.

    Args:
        manifest: Of the bundle.
        name: The target; None: that of the bundle.
        method: Another method, without a budget, after which the new bundle is named; None: the bundle's own
            methods with their budgets.
    """
    model, wanted = manifest.source.model, manifest.target if name is None else name
    words = ["visprune-export"]
    if model != DEMO:
        words.append(model if "/" in model else "MODEL")
    words += _parts(manifest)
    words += ["--conversation", manifest.source.conversation] if manifest.source.conversation else []
    words += ["--pickled-weights"] if manifest.source.pickled_weights else []
    words += ["--method", method] if method is not None else _methods(manifest)
    if manifest.dtype not in {TARGETS[one].dtype for one in (manifest.target, wanted) if one in TARGETS}:
        words += ["--dtype", WIDTHS[manifest.dtype]]
    if name is not None or manifest.target != "onnxruntime":
        words += ["--target", wanted]
    if method is not None:
        words += ["-o", method]
    quantize = " ".join(["visprune-quantize", *([method] if method is not None else [])])
    return " ".join(words) + (f", then {quantize} with the same options" if manifest.quantization else "")


def _parts(manifest: Manifest) -> list[str]:
    """Return the options that name a model's adapters and its vision tower, if it came from elsewhere."""
    words = []
    for part in manifest.source.parts:
        source = manifest.source
        if (part.name, part.revision) != (source.model, source.revision):  # else it lies beside the weights
            option, directory = {
                "adapter": ("--adapter", "ADAPTER"),
                "vision tower": ("--vision-tower", "TOWER"),
            }[part.role]
            words += [option, part.name if "/" in part.name else directory]
    return words


def _methods(manifest: Manifest) -> list[str]:
    """Return the options that name a bundle's methods, their budgets, and the segments of its decoder."""
    before, inside = manifest.pruning, manifest.layer_pruning
    words = ["--method", before.method if inside is None or before.budget.prunable else inside.method]
    if before.budget.prunable:
        words += ["--keep-tokens", str(before.keep_tokens)]
    if inside is not None and inside.budget.is_recipe:
        words += ["--then", inside.method] if before.budget.prunable else []
        published = inside.options.get("recipe")
        words += ["--recipe", published if isinstance(published, str) else "BUNDLE/recipe.json"]
    elif inside is not None:
        ratio = f"{inside.budget.ratio:g}"
        words += ["--then", f"{inside.method}:{ratio}"] if before.budget.prunable else ["--ratio", ratio]
    elif (segments := sum(graph.startswith("decoder_segment") for graph in manifest.graphs)) > 1:
        words += ["--segments", str(segments)]
    return words
