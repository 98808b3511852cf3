"""`visprune export`: from a checkpoint to a bundle, with progress and the result of the self-check."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import Model
from visprune.commands.option_fields import typer_option, with_options
from visprune.commands.quantize import judge_for, print_report, read_report
from visprune.errors import ExportError, UsageError
from visprune.export.export_options import ExportOptions
from visprune.quantize.quantize_options import QuantizeOptions
from visprune.targets import DTYPES
from visprune.terminal import bars, note, print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from visprune.bundle import Bundle
    from visprune.export.preview import Preview
    from visprune.progress import Progress

__all__ = ["RecipeFile", "Then", "export"]

Then = Annotated[str | None, typer_option(ExportOptions, "then")]
RecipeFile = Annotated[Path | None, typer_option(ExportOptions, "recipe")]


@with_options(ExportOptions, before={"target": ("precision", "calibration", "output")})
def export(
    model: Model = None,
    *,
    options: ExportOptions,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Quantize it too, see `visprune quantize`.", show_default="float"),
    ] = None,
    calibration: Annotated[Path | None, typer_option(QuantizeOptions, "calibration")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The bundle to make.", show_default="MODEL-METHOD-keepK"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and needed; read no weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Export a LLaVA model with visual-token pruning to ONNX.

    MODEL is in the format of transformers or in LLaVA's original one, with its weights as safetensors or as
    pickles (--pickled-weights). LoRA adapters are merged (--adapter).

    Example: visprune-export llava-hf/llava-1.5-7b-hf --method fopru-rank --ratio 0.25 --dry-run
    """
    quantization = None
    if precision is not None:
        quantization = _check_precision(precision, calibration, output, options, model)
    if dry_run:
        _preview(model, output, options, precision, as_json=as_json)
        return
    begin = time.monotonic()
    with bars() as progress:
        from visprune.export.exporter import run

        if quantization is not None and output is not None:
            made = _then_quantize(model, output, options, quantization, progress)
        else:
            made = run(model, output, options, progress, note)
    if as_json:
        print_json({"bundle": str(made.path), **_summary(made)})
    else:
        _print(made)
    note(f"This took {time.monotonic() - begin:.0f} seconds.")


def _check_precision(
    precision: str, calibration: Path | None, output: Path | None, options: ExportOptions, model: str | None
) -> QuantizeOptions:
    """Check the options of a quantization before the export that it follows."""
    from visprune.bundled import DEMO
    from visprune.quantize.quantizer import prepare
    from visprune.targets import target as find_target

    if output is None:
        raise UsageError("--precision needs a name for the bundle.", "Give one with -o.")
    quantization = QuantizeOptions(precision, calibration=calibration, force=options.force)
    platform = find_target(options.target)
    dtype = DTYPES[options.dtype] if options.dtype else platform.dtype
    prepare(quantization, options.target, dtype, DEMO if model is None else model)
    return quantization


def _then_quantize(
    model: str | None, output: Path, options: ExportOptions, quantization: QuantizeOptions, progress: Progress
) -> Bundle:
    """Export into a directory beside `output`, quantize that bundle to `output`, and remove it."""
    from visprune.export.exporter import run
    from visprune.manifest import MANIFEST
    from visprune.quantize.quantizer import quantize_bundle
    from visprune.staging import check_destination, scratch

    check_destination(output, force=options.force, marker=MANIFEST)
    with scratch(output) as folder:
        made = run(model, folder / "float", replace(options, force=False), progress, note)
        return quantize_bundle(made, output, quantization, judge=judge_for(made), progress=progress)


def _preview(
    model: str | None, output: Path | None, options: ExportOptions, precision: str | None, *, as_json: bool
) -> None:
    """Do the dry run.

    Raises:
        ExportError: This machine lacks memory or space for the export; raised after the result is printed.
    """
    with bars():
        from visprune.export.preview import run

        found = run(model, output, options)
    if as_json:
        print_json(asdict(found))
    else:
        _print_preview(found)
        if precision is not None:
            print(f"It would be quantized to {precision} after that; the sizes are those before.")
    if found.obstacle is not None:
        raise ExportError(*found.obstacle)


def _summary(bundle: Bundle) -> dict[str, object]:
    """Return the facts of an export for `--json`."""
    manifest = bundle.manifest
    budget, inside = manifest.pruning.budget, manifest.layer_pruning
    return {
        "method": manifest.pruning.method,
        "visual_tokens": budget.visual_tokens,
        "keep_tokens": manifest.pruning.keep_tokens,
        "ratio": manifest.pruning.keep_tokens / budget.visual_tokens,
        "inside": asdict(inside) if inside else None,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "bytes": sum(record.size for record in manifest.files.values()),
        "parity": asdict(manifest.parity),
    }


def _print(bundle: Bundle) -> None:
    """Print the result in a few lines, and then the tables."""
    from rich.console import Console
    from rich.table import Table

    from visprune.commands.inspect import graph_size, parity_line, parity_table, work_line
    from visprune.runtime.vision.kept_tokens import keep_for

    manifest = bundle.manifest
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(keep_for(manifest).describe(manifest))
    console.print(f"work: {work_line(manifest)}")
    if manifest.quantization is not None:
        print_report(bundle, read_report(bundle))
        return
    total = in_bytes(sum(record.size for record in manifest.files.values()))
    console.print(f"wrote {bundle.path} ({total}; {manifest.target}, {manifest.dtype})")
    console.print(parity_line(manifest))
    console.print()
    table = Table("graph", "size", box=None, pad_edge=False)
    for name in manifest.graphs:
        table.add_row(name, in_bytes(graph_size(manifest, name)))
    console.print(table)
    if manifest.parity.rows:
        console.print()
        console.print(parity_table(manifest))


def _print_preview(found: Preview) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("graph", "file", "parameters", "weights", box=None, pad_edge=False)
    for graph in found.graphs:
        table.add_row(graph.name, graph.file, f"{graph.parameters:,}", in_bytes(graph.bytes))
    console.print(table)
    commit = f" at {found.revision[:12]}" if found.revision else ""
    console.print(f"\nmodel   {found.model}{commit}, {found.method}")
    console.print(found.kept or "counts  not known yet")
    target = f"{found.target}: {found.flavour} flavour, opset {found.opset}, {found.dtype}"
    console.print(f"target  {target}")
    console.print(f"disk    {in_bytes(found.bytes)} of {in_bytes(found.free_bytes)} that are free")
    need = found.memory
    steps = [f"{in_bytes(need.export)} to export"]
    steps += [f"{in_bytes(need.float32)} to fit the recipe"] if found.kept is None else []
    how = " layer by layer" if found.self_check == "layers" else ""
    steps += [f"{in_bytes(found.self_check_bytes)} for the self-check{how}"] if found.self_check else []
    free = "" if found.available_memory is None else f"; {in_bytes(found.available_memory)} are free here"
    console.print(f"memory  about {', '.join(steps)}{free}")
    console.print(f"        about {in_bytes(need.run)} to run, on a CPU, which computes in float32")
    for text in found.notes:
        console.print(text)
    console.print(f"would write {found.output}; this was a dry run, and nothing was written")
