"""`visprune export`: from a checkpoint to a bundle, with progress and the self-check's table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from visprune.commands.options import MaxPrunePoints, Model, Samples
from visprune.commands.terminal import bars, print_json, size

if TYPE_CHECKING:
    from typing import Literal

    from visprune.bundle import Bundle

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
    then: Annotated[
        str | None,
        typer.Option(metavar="NAME[:RATIO]", help="A method inside the LLM after one before it: fastv:0.5."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For fitprune: what `visprune fit` wrote.")
    ] = None,
    data: Samples = None,
    max_prune_points: MaxPrunePoints = None,
    segments: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut the decoder into N files, with nothing pruned inside."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The bundle to make.", show_default="MODEL-METHOD-keepK"
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="NAME", help="Platform: onnxruntime or jetpack6.")
    ] = "onnxruntime",
    dtype: Annotated[str | None, typer.Option(help="fp32 or fp16.", show_default="the target's own")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every graph with PyTorch.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Export a LLaVA model with visual-token pruning to ONNX.

    Example: visprune-export --method fopru-row --ratio 0.25
    """
    with bars() as progress:
        from visprune.export import export as run

        bundle = run(
            model,
            method=method,
            output=output,
            progress=progress,
            ratio=ratio,
            keep_tokens=keep_tokens,
            then=then,
            recipe=recipe,
            calibration=data,
            max_prune_points=max_prune_points,
            segments=segments,
            target=target,
            dtype=cast("Literal['fp32', 'fp16'] | None", dtype),
            verify=verify,
            force=force,
        )
    if as_json:
        print_json({"bundle": str(bundle.path), **_summary(bundle)})
        return
    _print(bundle)


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
    from visprune.runtime.keep import keep_for

    manifest = bundle.manifest
    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("graph", "size", box=None, pad_edge=False)
    for name in manifest.graphs:
        table.add_row(name, size(graph_size(manifest, name)))
    console.print(table)
    console.print()
    console.print(parity_table(manifest))
    console.print()
    console.print(keep_for(manifest).describe(manifest))
    console.print(f"work: {work_line(manifest)}")
    total = size(sum(record.size for record in manifest.files.values()))
    console.print(f"wrote {bundle.path} ({total}; {manifest.target}, {manifest.dtype})")
