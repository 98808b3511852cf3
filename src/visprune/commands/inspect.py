"""`visprune inspect`: what a bundle holds, and whether its files are whole."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visprune.commands.options import BundleDir
from visprune.commands.terminal import print_json, size

if TYPE_CHECKING:
    from visprune.bundle import Bundle, Manifest, TensorSpec


__all__ = ["graph_size", "inspect", "parity_table"]


def inspect(
    bundle: BundleDir,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead.")] = False,
) -> None:
    """Show what a bundle holds.

    Example: visprune-inspect llava-fopru --verify
    """
    from visprune.bundle import Bundle

    opened = Bundle.open(bundle)
    if verify:
        _verify(opened)
    if as_json:
        print_json({**asdict(opened.manifest), "verified": verify})
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in _facts(opened.manifest):
        console.print(line)
    for table in (_graphs(opened.manifest), parity_table(opened.manifest)):
        console.print()
        console.print(table, soft_wrap=False)
    if verify:
        console.print(f"\nall {len(opened.manifest.files)} files have their hashes")


def _verify(bundle: Bundle) -> None:
    """Hash everything anew, whatever was remembered, with a bar for a person who looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=sum(record.size for record in bundle.manifest.files.values()))
        for name, record in bundle.manifest.files.items():
            progress.update(task, description=name)
            bundle.verify([name])
            progress.advance(task, record.size)


def _facts(manifest: Manifest) -> list[str]:
    source, pruning, decoder = manifest.source, manifest.pruning, manifest.decoder
    options = ", ".join(f"{name}={value}" for name, value in pruning.options.items())
    grid = f"{pruning.grid[0]} x {pruning.grid[1]}" if pruning.grid else "no grid"
    window = f", sliding window {decoder.sliding_window}" if decoder.sliding_window else ""
    always = f", and {pruning.always_kept} always" if pruning.always_kept else ""
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    stages = " > ".join(f"({s.graph})" if s.when == "visual" else s.graph for s in manifest.stages)
    total = sum(record.size for record in manifest.files.values())
    return [
        f"model     {source.model} ({source.model_type}: {source.vision_type} + {source.text_type})",
        f"weights   {source.parameters:,} parameters, {source.weights_dtype}, "
        f"SHA-256 {source.weights_sha256[:16]}",
        f"target    {manifest.target}: {manifest.flavour} flavour, opset {manifest.opset}, {manifest.dtype}",
        f"pruning   {pruning.method}{f' ({options})' if options else ''}: "
        f"{pruning.budget.describe(pruning.keep_tokens)}{always}",
        f"counts    {pruning.budget.unit}s of {pruning.budget.unit_tokens}, {grid}, "
        f"positions {pruning.positions}",
        f"decoder   {decoder.num_layers} layers, {decoder.num_kv_heads} key-value heads of "
        f"{decoder.head_dim}, cache {decoder.cache_dtype}, context {decoder.context_length}{window}",
        f"stages    {stages}   (in brackets: only for new images)",
        f"files     {len(manifest.files)}, {size(total)}",
        f"made      {source.created}, {versions}",
    ]


def _graphs(manifest: Manifest) -> Any:
    from rich.table import Table

    table = Table("graph", "size", "inputs", "outputs", box=None, pad_edge=False)
    for name, graph in manifest.graphs.items():
        table.add_row(name, size(graph_size(manifest, name)), _tensors(graph.inputs), _tensors(graph.outputs))
    return table


def graph_size(manifest: Manifest, name: str) -> int:
    """Bytes of a graph and its weights."""
    graph = manifest.graphs[name]
    return sum(manifest.files[file].size for file in (graph.file, graph.data) if file)


def _tensors(specs: tuple[TensorSpec, ...]) -> Any:
    """One tensor a line; the caches of all layers but the first are counted, not listed."""
    from rich.text import Text

    lines, more = [], 0
    for spec in specs:
        layer = spec.name.split(".")
        if len(layer) == 3 and layer[1] != "0":
            more += 1
            continue
        lines.append(f"{spec.name} {spec.dtype} [{', '.join(str(dim) for dim in spec.shape)}]")
    return Text("\n".join(lines + ([f"... and {more} more of the cache"] if more else [])))


def parity_table(manifest: Manifest) -> Any:
    """The self-check of the export, for a rich console."""
    from rich.table import Table

    if not manifest.parity.verified:
        return "parity    not checked: exported with --no-verify"
    table = Table("compared with PyTorch", "difference", "tolerance", "", "", box=None, pad_edge=False)
    for row in manifest.parity.rows:
        verdict = "ok" if row.passed else "FAILED"
        table.add_row(row.name, f"{row.difference:.2g}", f"{row.tolerance:.2g}", verdict, row.note)
    return table
