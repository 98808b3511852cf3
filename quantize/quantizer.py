"""From a float bundle to a quantized one: what is asked for is checked here, and done in `job`."""

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
from visprune.quantize.quantize_options import QuantizeOptions, Settings, resolve
from visprune.runtime.samples import Samples, draw_samples, read_samples
from visprune.staging import check_destination, existing_parent, staged, tidy
from visprune.targets import target
from visprune.verified import verify

if TYPE_CHECKING:
    from visprune.quantize.outcome import Judge

__all__ = ["prepare", "quantize"]

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
        precision: Of the parts that no other option names: "int8", "int8-dynamic", "fp8" or "int4".
        judge: Asks both bundles questions with known answers, for the report.
        progress: Called as the work goes on.
        **options: The other fields of `QuantizeOptions`.

    Raises:
        UsageError: Options that make no sense, no calibration data, an output that exists.
        UnsupportedError: The bundle's target cannot take a precision.
        BundleError: The bundle is altered, or computes numbers that are not finite.
        InputError: A calibration sample that cannot be used.
        ExportError: The disk is full.
        MissingExtraError: onnx-ir or onnxruntime is missing.
    """
    chosen = QuantizeOptions(precision, **options)
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = source.manifest
    if manifest.quantization is not None:
        done = ", ".join(f"{part} {name}" for part, name in manifest.quantization.parts.items())
        raise UsageError(
            f"This bundle is quantized already ({done}).", "Quantize the float bundle that it was made from."
        )
    if manifest.engines:
        raise UsageError(
            "This bundle has engines, which would be of the float graphs.",
            "Quantize the bundle that they were built from, and build engines of the result.",
        )
    destination = Path(output)
    check_destination(destination, force=chosen.force, marker=MANIFEST)
    settings, samples = prepare(chosen, manifest.target, manifest.dtype, manifest.source.model)
    verify(source)
    for done in tidy(existing_parent(destination)):
        _log.warning(done)
    from visprune.quantize.quantize_job import Job

    job = Job(source, settings, chosen, samples, progress or no_progress)
    with staged(destination) as folder:
        job.write(folder, judge)
    return Bundle.open(destination)


def prepare(options: QuantizeOptions, target_name: str, dtype: str, model: str) -> tuple[Settings, Samples]:
    """Refuse what can be refused without a bundle, and read the calibration data.

    Args:
        options: What was asked for.
        target_name: Of the bundle.
        dtype: Its float type.
        model: Name of the model in it; the demo model has samples of its own.

    Returns:
        What the options mean, and the samples; none where none are needed or given.

    Raises:
        UsageError, UnsupportedError, InputError, MissingExtraError: As for `quantize`.
    """
    settings = resolve(options, target(target_name), dtype)
    for package, extra in (("onnx_ir", "quantize"), ("onnxruntime", "cpu")):
        require(package, extra=extra)
    if options.calibration is None and model != DEMO:
        if settings.needs_samples:
            raise UsageError(
                "int8 and fp8 need calibration data, to find the ranges of activations.",
                "Give --calibration FILE with a few dozen pictures and prompts like those in use; "
                "int8-dynamic and int4 work without.",
            )
        return settings, Samples(())
    found = read_samples(options.calibration, max_skipped=options.max_skipped)
    drawn = draw_samples(found.usable, options.samples, options.seed)
    if len(drawn) < 2:
        raise UsageError(
            "One sample is too few: ranges come from some, and errors are measured on others.",
            "Give at least two, better a few dozen.",
        )
    return settings, Samples(drawn, found.skipped)
