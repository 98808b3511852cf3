"""`visprune inspect`: the contents of a bundle, and a check of its files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visprune.commands.arguments import BundleDir
from visprune.terminal import print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from visprune.budget import Budget
    from visprune.bundle import Bundle
    from visprune.manifest import Manifest, Pruning, TensorSpec


__all__ = ["graph_size", "inspect", "parity_line", "parity_table", "work_line"]


def inspect(
    bundle: BundleDir,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and its work as JSON instead.")
    ] = False,
) -> None:
    """Show what a bundle holds.

    Example: visprune-inspect llava-fopru --verify
    """
    from visprune.bundle import Bundle

    opened = Bundle.open(bundle)
    if verify:
        _verify(opened)
    if as_json:
        print_json({**asdict(opened.manifest), "work": _work(opened.manifest), "verified": verify})
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in [*_facts(opened.manifest), *_text(opened)]:
        console.print(line)
    for table in (_graphs(opened.manifest), parity_table(opened.manifest)):
        console.print()
        console.print(table, soft_wrap=False)
    if verify:
        console.print(f"\nall {len(opened.manifest.files)} files have their hashes")


def _verify(bundle: Bundle) -> None:
    """Hash every file again, without the cache of verified files, and show a progress bar on a terminal."""
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
    options = _options(pruning.options)
    grid = f"{pruning.grid[0]} x {pruning.grid[1]}" if pruning.grid else "no grid"
    window = f", sliding window {decoder.sliding_window}" if decoder.sliding_window else ""
    always = f", and {pruning.always_kept} always" if pruning.always_kept else ""
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    stages = " > ".join(f"({s.graph})" if s.when != "always" else s.graph for s in manifest.stages)
    total = sum(record.size for record in manifest.files.values())
    commit = f" at {source.revision[:12]}" if source.revision else ""
    return [
        f"model     {source.model}{commit} ({source.model_type}: {source.vision_type} + {source.text_type})",
        *_parts(manifest),
        f"weights   {source.parameters:,} parameters, {source.weights_dtype}, "
        f"SHA-256 {source.weights_sha256[:16]}",
        f"target    {manifest.target}: {manifest.flavour} flavour, opset {manifest.opset}, {manifest.dtype}",
        f"pruning   {pruning.method}{options}: {pruning.budget.describe(pruning.keep_tokens)}{always}",
        f"counts    {_units(pruning.budget)}, {grid}, positions {pruning.positions}",
        *_reads(pruning),
        *_inside(manifest),
        *_tiles(manifest),
        f"decoder   {decoder.num_layers} layers, {decoder.num_kv_heads} key-value heads of "
        f"{decoder.head_dim}, cache {decoder.cache_dtype}, context {decoder.context_length}{window}",
        *_quantized(manifest),
        *_engines(manifest),
        *_work_lines(manifest),
        f"stages    {stages}   (in brackets: only for new images)",
        f"files     {len(manifest.files)}, {in_bytes(total)}",
        f"made      {source.created}, {versions}",
    ]


def _units(budget: Budget) -> str:
    """Return what a method counts, for people."""
    if budget.unit == "square":
        return "tokens of a smaller square grid"
    return "rows" if budget.unit == "row" else "tokens"


def _reads(pruning: Pruning) -> list[str]:
    """Return the line about what decides the tokens of an image, beside the image and the count."""
    found = ["the question decides which tokens are kept"] if pruning.needs_text else []
    found += ["kept tokens may be made of several"] if pruning.merges else []
    found += ["the image is made smaller before the vision tower"] if pruning.resizes else []
    return [f"          {'; '.join(found)}"] if found else []


def _parts(manifest: Manifest) -> list[str]:
    """Return a line for each part of the model that came from a place of its own."""
    lines = []
    for part in manifest.source.parts:
        commit = f" at {part.revision[:12]}" if part.revision else ""
        role = {"adapter": "adapter   ", "vision tower": "tower     "}[part.role]
        lines.append(f"{role}{part.name}{commit}, SHA-256 {part.sha256[:16]}")
    return lines


def _text(bundle: Bundle) -> list[str]:
    """Return the lines about the chat template and the tokens that end an answer."""
    from visprune.runtime.reading import read_template, read_tokenizer

    tokenizer, template = read_tokenizer(bundle), read_template(bundle)
    system = "and a system prompt" if template.shows_system else "but no system prompt"
    shows = f"shows {template.describe()}, {system}"
    if bundle.manifest.text.chat_template is None:
        shows = "none: prompts are handed to the model as they are"
    names = [f"{tokenizer.backend.id_to_token(token)} ({token})" for token in tokenizer.eos_token_ids]
    return [f"template  {shows}", f"ends      {', '.join(names) or 'none: answers go on to the limit'}"]


def _quantized(manifest: Manifest) -> list[str]:
    """Return the lines about the precisions and the errors that quantization adds."""
    found = manifest.quantization
    if found is None:
        return []
    parts = ", ".join(f"{part} {precision}" for part, precision in found.parts.items())
    samples = f"; ranges from {found.samples} samples" if found.samples else ""
    errors = ", ".join(f"{error.graph} {error.relative_l2:.2%}" for error in found.errors)
    lines = [f"quantized {parts}{samples}"]
    lines += [f"          error of the output on held-out samples: {errors}"] if errors else []
    lines += [f"          left float: {', '.join(found.kept_float)}"] if found.kept_float else []
    return lines


def _engines(manifest: Manifest) -> list[str]:
    """Return the line about the engines: how many, for which GPUs, built by which package."""
    if not manifest.engines:
        return []
    first = manifest.engines[0]
    sms = ", ".join(f"SM{sm}" for sm in dict.fromkeys(engine.sm for engine in manifest.engines))
    total = sum(manifest.files[engine.file].size for engine in manifest.engines)
    return [
        f"engines   {len(manifest.engines)} for {sms}, {in_bytes(total)}, by {first.flavour} {first.version}"
    ]


def _options(options: dict[str, Any]) -> str:
    """Return a method's settings in brackets; long lists, such as a recipe's, are counted and not shown."""
    shown = []
    for name, value in options.items():
        if value is None:
            continue
        long = isinstance(value, (list, tuple)) and len(value) > 4
        short = f"{value:.4g}" if isinstance(value, float) else value
        shown.append(f"{name}: {len(value)} values" if long else f"{name}={short}")
    return f" ({', '.join(shown)})" if shown else ""


def _tiles(manifest: Manifest) -> list[str]:
    """Return the line about the tiles of an image."""
    tiling = manifest.tiling
    if tiling is None:
        return []
    counts = sorted({f"{h // tiling.tile_size} x {w // tiling.tile_size}" for h, w in tiling.pinpoints})
    grids = ", ".join(counts) if len(counts) <= 6 else f"{len(counts)} grids up to {counts[-1]}"
    more = f", features resampled above {tiling.max_tiles} tiles" if tiling.max_tiles else ""
    pooled = f"; frames of a video averaged over {p} x {p} patches" if (p := tiling.frame_pooling) else ""
    several = "; several pictures are not tiled" if tiling.several == "whole" else ""
    return [
        f"tiles     the whole picture and {grids} of {tiling.tile_size} pixels{more}, newline tokens kept"
        f"{several}{pooled}"
    ]


def _inside(manifest: Manifest) -> list[str]:
    """Return the line about pruning inside the LLM, for one image at the default ratio."""
    inside, before = manifest.layer_pruning, manifest.pruning
    if inside is None:
        return []
    from visprune.runtime.vision.kept_tokens import Keep

    whole = Keep(before.keep_tokens).describe(manifest)
    sentence = whole.rpartition("; then ")[2]
    return [f"inside    {inside.method}{_options(inside.options)}: {sentence}; positions {inside.positions}"]


def _work(manifest: Manifest) -> dict[str, Any] | None:
    """Return the work that pruning saves, for `--json`; None if the manifest lacks the model's shapes."""
    from visprune.estimate.flops import savings

    found = savings(manifest)
    return asdict(found) if found else None


def work_line(manifest: Manifest) -> str:
    """Return how much of the decoder's prefill of one image pruning saves, with the counting convention."""
    from visprune.estimate.flops import savings

    found = savings(manifest)
    if found is None:
        return "not known: this bundle does not say its model's shapes"
    matrices = {"F2": "two", "F3": "three"}[found.convention]
    return (
        f"decoder, {found.visual_tokens} visual tokens of {_one_image(manifest)}: "
        f"{found.visual.describe(found.unit)} ({found.convention}: {matrices} MLP matrices)"
    )


def _one_image(manifest: Manifest) -> str:
    from visprune.runtime.vision.arrangement import largest_size

    if manifest.tiling is None:
        return "one image"
    height, width = largest_size(manifest.tiling)
    return f"an image of {width} x {height} pixels"


def _work_lines(manifest: Manifest) -> list[str]:
    from visprune.estimate.flops import savings

    found = savings(manifest)
    first = f"work      {work_line(manifest)}"
    if found is None:
        return [first]
    cache = found.cache_bytes
    return [
        first,
        f"          with {found.text_tokens} text tokens: {found.sequence.describe(found.unit)}",
        f"          and with the vision tower, projector and output head: {found.model.describe(found.unit)}",
        f"cache     {in_bytes(cache.pruned)} of {in_bytes(cache.unpruned)} for the visual tokens, "
        f"{100 * cache.removed:.1f}% removed",
    ]


def _graphs(manifest: Manifest) -> Any:
    from rich.table import Table

    table = Table("graph", "size", "inputs", "outputs", box=None, pad_edge=False)
    for name, graph in manifest.graphs.items():
        table.add_row(
            name, in_bytes(graph_size(manifest, name)), _tensors(graph.inputs), _tensors(graph.outputs)
        )
    return table


def graph_size(manifest: Manifest, name: str) -> int:
    """Return the bytes of a graph and its weights."""
    graph = manifest.graphs[name]
    return sum(manifest.files[file].size for file in (graph.file, graph.data) if file)


def _tensors(specs: tuple[TensorSpec, ...]) -> Any:
    """Return one tensor a line; of the cache, only the first layer is listed and the others are counted."""
    from rich.text import Text

    lines, more = [], 0
    for spec in specs:
        layer = spec.name.split(".")
        if len(layer) == 3 and layer[1] != "0":
            more += 1
            continue
        lines.append(f"{spec.name} {spec.dtype} [{', '.join(str(dim) for dim in spec.shape)}]")
    return Text("\n".join(lines + ([f"... and {more} more of the cache"] if more else [])))


def parity_line(manifest: Manifest) -> str:
    """Return the result of a float bundle's self-check in one sentence."""
    parity = manifest.parity
    if not parity.verified:
        return "not compared with PyTorch: exported with --no-verify"
    # A bundle is written only if every comparison passed. The row nearest to its tolerance is shown.
    worst = max(parity.rows, key=lambda row: row.difference / row.tolerance if row.tolerance else 0.0)
    how = ", layer by layer" if parity.scope == "layers" else ""
    return (
        f"compared with PyTorch{how}: all {len(parity.rows)} agree (largest difference "
        f"{worst.difference:.2g} of {worst.tolerance:.2g} allowed)"
    )


def parity_table(manifest: Manifest) -> Any:
    """Return the comparisons of the export's self-check as a table, or a sentence if there is none."""
    from rich.table import Table

    if manifest.quantization is not None:
        return "parity    checked of the float bundle only; what quantization adds stands above"
    if not manifest.parity.verified:
        return "parity    not checked: exported with --no-verify"
    layers = manifest.parity.scope == "layers"
    caption = "Layers were compared one by one; the greedy check of the whole chain was skipped."
    table = Table("compared with PyTorch", "difference", "tolerance", "", "", box=None, pad_edge=False)
    table.caption = caption if layers else None
    table.caption_justify = "left"
    for row in manifest.parity.rows:
        verdict = "ok" if row.passed else "FAILED"
        table.add_row(row.name, f"{row.difference:.2g}", f"{row.tolerance:.2g}", verdict, row.note)
    return table
