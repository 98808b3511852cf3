"""The entry points of quantization. They check everything that can be checked, then run a `QuantizeJob`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.bundle import Bundle
from visprune.bundled import DEMO
from visprune.errors import UsageError
from visprune.manifest import MANIFEST
from visprune.optional import require
from visprune.progress import Progress, no_progress
from visprune.quantize.quantize_options import QuantizeOptions, ResolvedOptions, resolve
from visprune.runtime.samples import Samples, draw_samples, read_samples
from visprune.staging import check_destination, existing_parent, staged, tidy
from visprune.targets import target
from visprune.verified import verify

if TYPE_CHECKING:
    from visprune.quantize.outcome import Judge

__all__ = ["prepare", "quantize", "quantize_bundle"]

_log = logging.getLogger(__name__)


def quantize(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    precision: str,
    judge: Judge | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Quantize the linear layers of a bundle into a new bundle.

    Args:
        bundle: A float bundle, pruned or not.
        output: The directory to make.
        precision: Precision of the parts without an option of their own: "int8", "int8-dynamic",
            "int8-weights", "fp8" or "int4".
        judge: Asks both bundles questions with known answers, for the report.
        progress: Called as the work goes on.
        **options: The other fields of `QuantizeOptions`.

    Raises:
        TypeError: An option is not a field of `QuantizeOptions`.
        UsageError: An option has a value that is not offered, there is no calibration data, the output
            exists, or the bundle is quantized or has engines.
        UnsupportedError: The bundle's target does not support a precision.
        BundleError: The bundle is altered, or computes numbers that are not finite.
        InputError: A calibration sample cannot be used.
        ExportError: The disk is full.
        MissingExtraError: onnx-ir or onnxruntime is missing.
    """
    return quantize_bundle(
        bundle, output, QuantizeOptions(precision, **options), judge=judge, progress=progress
    )


def quantize_bundle(
    bundle: str | Path | Bundle,
    output: str | Path,
    options: QuantizeOptions,
    *,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a bundle with these options; see `quantize`."""
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = source.manifest
    if manifest.quantization is not None:
        done = ", ".join(f"{part} {name}" for part, name in manifest.quantization.parts.items())
        raise UsageError(
            f"This bundle is quantized already ({done}).", "Quantize the float bundle that it was made from."
        )
    if manifest.engines:
        raise UsageError(
            "This bundle has engines, and they were built from its float graphs.",
            "Quantize the bundle that they were built from, and build engines of the result.",
        )
    destination = Path(output)
    check_destination(destination, force=options.force, marker=MANIFEST)
    resolved, samples = prepare(options, manifest.target, manifest.dtype, manifest.source.model)
    verify(source)
    for done in tidy(existing_parent(destination)):
        _log.warning(done)
    from visprune.quantize.quantize_job import QuantizeJob  # needs packages that `prepare` looks for

    job = QuantizeJob(source, resolved, options, samples, progress or no_progress)
    with staged(destination) as folder:
        job.write(folder, judge)
    return Bundle.open(destination)


def prepare(
    options: QuantizeOptions, target_name: str, dtype: str, model: str
) -> tuple[ResolvedOptions, Samples]:
    """Check everything that can be checked without a bundle, and read the calibration data.

    Args:
        options: The options of the quantization.
        target_name: Name of the bundle's target.
        dtype: Float type of the bundle.
        model: Name of the bundle's model; the demo model has samples of its own.

    Returns:
        The resolved options, and the samples. There are no samples if none are needed and none are given.

    Raises:
        UsageError, UnsupportedError, InputError, MissingExtraError: As for `quantize`.
    """
    resolved = resolve(options, target(target_name), dtype)
    for package, extra in (("onnx_ir", "quantize"), ("onnxruntime", "cpu")):
        require(package, extra=extra)
    if options.calibration is None and model != DEMO:
        if resolved.needs_samples:
            raise UsageError(
                "int8 and fp8 need calibration data, to find the ranges of activations.",
                "Give --calibration FILE with a few dozen images and prompts like those in use; "
                "int8-dynamic and int4 work without.",
            )
        return resolved, Samples(())
    found = read_samples(options.calibration, max_skipped=options.max_skipped)
    drawn = draw_samples(found.usable, options.samples, options.seed)
    if len(drawn) < 2:
        raise UsageError(
            "One sample is too few: ranges come from some samples, and errors are measured on others.",
            "Give at least two samples, better a few dozen.",
        )
    return resolved, Samples(drawn, found.skipped)
