"""`visprune export`: from a checkpoint to a bundle, with progress and the self-check's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from visprune.commands.arguments import (
    ChatTemplateFile,
    MaxPrunePoints,
    Model,
    RecipeFile,
    Revision,
    Samples,
    Then,
    TrustRemoteCode,
)
from visprune.commands.quantize import Calibration, judge_for, print_report, read_report
from visprune.errors import ExportError
from visprune.targets import DTYPES, TARGETS
from visprune.terminal import bars, print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from typing import Literal

    from visprune.bundle import Bundle
    from visprune.export.preview import Preview
    from visprune.quantize.quantize_options import QuantizeOptions

__all__ = ["export"]


def export(  # noqa: PLR0913 - a command line's options
    model: Model = None,
    *,
    method: Annotated[
        str, typer.Option("--method", "-m", metavar="NAME", help="Pruning method, see `visprune methods`.")
    ],
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Fraction to KEEP, in (0, 1]: of the visual tokens, or of the visual work for fitprune.",
            show_default="1.0, or the method's own",
        ),
    ] = None,
    keep_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens to keep of one image, instead.")
    ] = None,
    then: Then = None,
    recipe: RecipeFile = None,
    data: Samples = None,
    max_prune_points: MaxPrunePoints = None,
    anyres_scope: Annotated[
        str,
        typer.Option(
            metavar="SCOPE", help="Where a picture is several tiles: keep as many of each tile, or global."
        ),
    ] = "tile",
    segments: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut the decoder into N files, with nothing pruned inside."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Quantize it too, see `visprune quantize`.", show_default="float"),
    ] = None,
    calibration: Calibration = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The bundle to make.", show_default="MODEL-METHOD-keepK"
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="NAME", help=f"Platform: {', '.join(TARGETS)}.")
    ] = "onnxruntime",
    dtype: Annotated[str | None, typer.Option(help="fp32 or fp16.", show_default="the target's own")] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="whole|layers",
            help="Compare the LLM with PyTorch as a whole, or layer by layer.",
            show_default="whole if memory allows",
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Compare nothing with PyTorch.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplateFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and needed; read no weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Export a LLaVA model with visual-token pruning to ONNX.

    Example: visprune-export llava-hf/llava-1.5-7b-hf --method fopru-rank --ratio 0.25 --dry-run
    """
    if no_verify and verify is not None:
        from visprune.errors import UsageError

        raise UsageError("Both --verify and --no-verify were given.", "Give one of them.")
    with bars() as progress:
        from visprune.export import export as write
        from visprune.export.preview import Preview, preview

        real: Callable[..., Bundle] = partial(write, progress=progress)
        if precision is not None:
            chosen = _check_precision(precision, calibration, output, target, dtype, model, force=force)
            real = partial(_then_quantize, real, chosen, progress)
        run: Callable[..., Bundle | Preview] = preview if dry_run else real
        made = run(
            model,
            method=method,
            output=output,
            ratio=ratio,
            keep_tokens=keep_tokens,
            then=then,
            recipe=recipe,
            calibration=data,
            max_prune_points=max_prune_points,
            anyres_scope=cast("Literal['tile', 'global']", anyres_scope),
            segments=segments,
            target=target,
            dtype=cast("Literal['fp32', 'fp16'] | None", dtype),
            verify=not no_verify if verify is None else cast("Literal['whole', 'layers']", verify),
            force=force,
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
        )
    if isinstance(made, Preview):
        print_json(asdict(made)) if as_json else _print_preview(made)
        if precision is not None and not as_json:
            print(f"It would be quantized to {precision} after that; the sizes are those before.")
        if made.obstacle is not None:
            raise ExportError(*made.obstacle)
    elif as_json:
        print_json({"bundle": str(made.path), **_summary(made)})
    else:
        _print(made)
        if made.manifest.quantization is not None:
            print_report(made, read_report(made))


def _check_precision(
    precision: str,
    calibration: Path | None,
    output: Path | None,
    target: str,
    dtype: str | None,
    model: str | None,
    *,
    force: bool,
) -> QuantizeOptions:
    """Refuse what can be refused of a quantization before the export that it follows."""
    from visprune.bundled import DEMO
    from visprune.errors import UsageError
    from visprune.quantize.quantize_options import QuantizeOptions
    from visprune.quantize.quantizer import prepare
    from visprune.targets import target as find_target

    if output is None:
        raise UsageError("--precision needs a name for the bundle.", "Give one with -o.")
    options = QuantizeOptions(precision, calibration=calibration, force=force)
    platform = find_target(target)
    width = DTYPES.get(dtype, platform.dtype) if dtype else platform.dtype
    prepare(options, target, width, DEMO if model is None else model)
    return options


def _then_quantize(
    write: Callable[..., Bundle],
    options: QuantizeOptions,
    progress: Callable[[str, int, int], None],
    model: str | None,
    *,
    output: Path,
    force: bool,
    **rest: Any,
) -> Bundle:
    """Export beside the wanted place, quantize to it, and forget the float bundle."""
    from visprune.manifest import MANIFEST
    from visprune.quantize import quantize
    from visprune.staging import check_destination, scratch

    check_destination(output, force=force, marker=MANIFEST)
    with scratch(output) as folder:
        made = write(model, output=folder / "float", force=False, **rest)
        return quantize(
            made,
            output,
            precision=options.precision,
            calibration=options.calibration,
            force=force,
            judge=judge_for(made),
            progress=progress,
        )


def _summary(bundle: Bundle) -> dict[str, object]:
    """What a script wants to know of an export."""
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
    from rich.console import Console
    from rich.table import Table

    from visprune.commands.inspect import graph_size, parity_table, work_line
    from visprune.runtime.vision.kept_tokens import keep_for

    manifest = bundle.manifest
    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("graph", "size", box=None, pad_edge=False)
    for name in manifest.graphs:
        table.add_row(name, in_bytes(graph_size(manifest, name)))
    console.print(table)
    console.print()
    console.print(parity_table(manifest))
    console.print()
    console.print(keep_for(manifest).describe(manifest))
    console.print(f"work: {work_line(manifest)}")
    total = in_bytes(sum(record.size for record in manifest.files.values()))
    console.print(f"wrote {bundle.path} ({total}; {manifest.target}, {manifest.dtype})")


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
