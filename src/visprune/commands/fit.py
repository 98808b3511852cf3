"""`visprune fit`: a FitPrune recipe for a model, with a plot of the visual tokens by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.bundled import DEMO
from visprune.commands.arguments import Model
from visprune.commands.option_fields import with_options
from visprune.export.fitprune.fit_options import FitOptions
from visprune.terminal import bars, print_json

if TYPE_CHECKING:
    from visprune.pruning.recipe import Fit, Recipe

__all__ = ["fit"]

_WIDTH = 40


@with_options(FitOptions, before={"max_prune_points": ("output",)})
def fit(
    model: Model = None,
    *,
    options: FitOptions,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fit a FitPrune recipe: how many visual tokens each layer of the LLM may delete.

    Example: visprune-fit llava-1.5-7b-hf --ratio 0.4 --data samples.jsonl -o recipe.json
    """
    name = Path(model).resolve().name if model is not None else DEMO
    path = output if output is not None else Path(f"{name}-fitprune-{options.ratio:g}.json")
    with bars() as progress:
        from visprune.export.fitprune.fitting import run

        recipe = run(model, path, options, progress)
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
