"""`visprune export`: from a checkpoint to a bundle, with progress and the self-check's table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from visprune.commands.terminal import note, print_json, size

if TYPE_CHECKING:
    from typing import Literal

    from visprune.bundle import Bundle

__all__ = ["export"]


def export(  # noqa: PLR0913 - a command line's options
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A checkpoint directory or a hub id; left out, the bundled demo model."
        ),
    ] = None,
    *,
    method: Annotated[
        str, typer.Option("--method", "-m", metavar="NAME", help="Pruning method, see `visprune methods`.")
    ],
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of visual tokens to KEEP, in (0, 1].", show_default="1.0")
    ] = None,
    keep_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens to keep of one image, instead.")
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
    with _bars() as progress:
        from visprune.export import export as run

        bundle = run(
            model,
            method=method,
            output=output,
            progress=progress,
            ratio=ratio,
            keep_tokens=keep_tokens,
            target=target,
            dtype=cast("Literal['fp32', 'fp16'] | None", dtype),
            verify=verify,
            force=force,
        )
    if as_json:
        print_json({"bundle": str(bundle.path), **_summary(bundle)})
        return
    _print(bundle)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar a step on a terminal; a line a step elsewhere, so that a log shows where it is."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                note(f"{what} ...")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        first = bars.add_task("starting", total=None)

        def update(what: str, done: int, total: int) -> None:
            bars.update(first, visible=False)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _summary(bundle: Bundle) -> dict[str, object]:
    """What a script wants to know of an export."""
    manifest = bundle.manifest
    budget = manifest.pruning.budget
    return {
        "method": manifest.pruning.method,
        "visual_tokens": budget.visual_tokens,
        "keep_tokens": manifest.pruning.keep_tokens,
        "ratio": manifest.pruning.keep_tokens / budget.visual_tokens,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "bytes": sum(record.size for record in manifest.files.values()),
        "parity": asdict(manifest.parity),
    }


def _print(bundle: Bundle) -> None:
    from rich.console import Console
    from rich.table import Table

    from visprune.commands.inspect import graph_size, parity_table

    manifest = bundle.manifest
    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("graph", "size", box=None, pad_edge=False)
    for name in manifest.graphs:
        table.add_row(name, size(graph_size(manifest, name)))
    console.print(table)
    console.print()
    console.print(parity_table(manifest))
    console.print()
    console.print(manifest.pruning.budget.describe(manifest.pruning.keep_tokens))
    total = size(sum(record.size for record in manifest.files.values()))
    console.print(f"wrote {bundle.path} ({total}; {manifest.target}, {manifest.dtype})")
