"""`visprune fit`: a FitPrune recipe for a model, with a plot of the visual tokens by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.bundled import DEMO
from visprune.commands.arguments import (
    ChatTemplateFile,
    MaxPrunePoints,
    Model,
    Revision,
    Samples,
    TrustRemoteCode,
)
from visprune.terminal import bars, print_json

if TYPE_CHECKING:
    from visprune.pruning.recipe import Fit, Recipe

__all__ = ["fit"]

_WIDTH = 40


def fit(  # noqa: PLR0913 - a command line's options
    model: Model = None,
    *,
    ratio: Annotated[float, typer.Option(help="Fraction of the visual work to KEEP, in (0, 1].")],
    data: Samples = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The recipe to write.",
            show_default="MODEL-fitprune-RATIO.json",
        ),
    ] = None,
    max_prune_points: MaxPrunePoints = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Draw so many of the samples.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="To draw them with.")] = 0,
    device: Annotated[str, typer.Option(help="Where PyTorch computes: cpu or cuda.")] = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplateFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fit a FitPrune recipe: how many visual tokens each layer of the LLM may delete.

    Example: visprune-fit llava-1.5-7b-hf --ratio 0.4 --data samples.jsonl -o recipe.json
    """
    name = Path(model).resolve().name if model is not None else DEMO
    path = output if output is not None else Path(f"{name}-fitprune-{ratio:g}.json")
    with bars() as progress:
        from visprune.export.fitprune.fitting import fit as run

        recipe = run(
            model,
            output=path,
            progress=progress,
            ratio=ratio,
            data=data,
            max_prune_points=max_prune_points,
            samples=samples,
            seed=seed,
            device=device,
            force=force,
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
        )
    if as_json:
        print_json({"path": str(path), **asdict(recipe)})
        return
    _print(recipe, path)


def _print(recipe: Recipe, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    other = recipe.unconstrained
    left = recipe.visual_tokens
    console.print(f"{left} visual tokens enter {recipe.model}; those left after each layer:\n")
    for layer, count in enumerate(recipe.scheme):
        left -= count
        bar = "█" * max(1, round(_WIDTH * left / recipe.visual_tokens))
        gone = f"  -{count}" if count else ""
        console.print(f"{layer:4d}  {left:5d}  {bar:{_WIDTH}s}{gone}".rstrip())
    console.print()
    table = Table("", "recipe", *(["any number of points"] if other else []), box=None, pad_edge=False)
    columns: list[Recipe | Fit] = [recipe, *([other] if other else [])]
    table.add_row("prune points", *(_points(column) for column in columns))
    table.add_row("alpha", *(f"{column.alpha:.4f}" for column in columns))
    table.add_row("visual work, asked", *(f"{recipe.ratio:.2%}" for _ in columns))
    table.add_row("  on the samples", *(f"{column.ratio_on_samples:.2%}" for column in columns))
    table.add_row("  by this scheme", *(f"{column.ratio_reached:.2%}" for column in columns))
    if any(column.scheme[-1] for column in columns):
        exported = (f"{recipe.exported_ratio(column.scheme):.2%}" for column in columns)
        table.add_row("  as exported, without the last layer's", *exported)
    for text, key in (("visual tokens", "lost_self"), ("text", "lost_cross")):
        table.add_row(f"attention lost, by {text}", *(_lost(getattr(column, key)) for column in columns))
    console.print(table)
    console.print(
        f"\nwork: {recipe.convention}; fitted on {recipe.samples} samples, seed {recipe.seed}\nwrote {path}"
    )


def _points(fit: Recipe | Fit) -> str:
    layers = [str(layer) for layer, count in enumerate(fit.scheme) if count]
    word = "layer" if len(layers) == 1 else "layers"
    return f"{len(layers)} ({word} {', '.join(layers)})" if layers else "none"


def _lost(shares: tuple[float, ...]) -> str:
    return f"mean {sum(shares) / len(shares):.1%}, most {max(shares):.1%}"
