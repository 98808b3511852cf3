"""Arguments and options that several verbs share, so that their names and help texts are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BundleDir",
    "Frames",
    "Images",
    "KeepTokens",
    "LowMemory",
    "Model",
    "Provider",
    "Ratio",
    "RepetitionPenalty",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "Threads",
    "TopK",
    "TopP",
    "Videos",
]

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="A checkpoint directory or a hub id; left out, the bundled demo model."
    ),
]
BundleDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `visprune export` wrote.", show_default=False)
]
# Text and not Path, which would change a URL: it turns // into /.
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image", "-i", metavar="FILE", help="A picture, or a data: URL; may be given several times."
    ),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        "--video", metavar="PATH", help="A folder of frames or an animated picture, for a model of videos."
    ),
]
Frames = Annotated[int, typer.Option(metavar="N", help="Frames taken of a video, evenly spaced.")]
Temperature = Annotated[float, typer.Option(help="Randomness; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw from the tokens that make up this probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages what was said.")]
Seed = Annotated[int | None, typer.Option(help="Makes random answers repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text, or a special token's name, that ends an answer; may be given several times.",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="A system prompt, before all else.", show_default=False),
]
Ratio = Annotated[
    float | None, typer.Option(help="Fraction of visual tokens to KEEP; by default the export's.")
]
KeepTokens = Annotated[int | None, typer.Option(help="The same as a number of tokens of one image.")]
Provider = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What runs the graphs: cpu, cuda, ort-tensorrt, ort-tensorrt-rtx; or the engines: tensorrt, "
        "tensorrt-rtx.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Processor threads.", show_default="physical cores")]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory", help="Less memory, and slower: on the CPU half for fp16 weights; engines one by one."
    ),
]
