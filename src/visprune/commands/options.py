"""Options that `run` and `chat` share, so that they are called and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BundleDir",
    "Images",
    "KeepTokens",
    "Provider",
    "Ratio",
    "RepetitionPenalty",
    "Seed",
    "Temperature",
    "Threads",
    "TopK",
    "TopP",
]

BundleDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `visprune export` wrote.", show_default=False)
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", metavar="FILE", help="A picture; may be given several times."),
]
Temperature = Annotated[float, typer.Option(help="Randomness; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw from the tokens that make up this probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages what was said.")]
Seed = Annotated[int | None, typer.Option(help="Makes random answers repeatable.")]
Ratio = Annotated[
    float | None, typer.Option(help="Fraction of visual tokens to KEEP; by default the export's.")
]
KeepTokens = Annotated[int | None, typer.Option(help="The same as a number of tokens an image.")]
Provider = Annotated[str, typer.Option(metavar="NAME", help="What runs the graphs: cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Processor threads.", show_default="physical cores")]
