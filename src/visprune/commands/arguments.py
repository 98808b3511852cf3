"""Options that several verbs share, so that they are called and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BundleDir",
    "ChatTemplateFile",
    "Frames",
    "Images",
    "KeepTokens",
    "LowMemory",
    "MaxPrunePoints",
    "Model",
    "Provider",
    "Ratio",
    "RecipeFile",
    "RepetitionPenalty",
    "Revision",
    "Samples",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "Then",
    "Threads",
    "TopK",
    "TopP",
    "TrustRemoteCode",
    "Videos",
]

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="A checkpoint directory or a hub id; left out, the bundled demo model."
    ),
]
Then = Annotated[
    str | None,
    typer.Option(metavar="NAME[:RATIO]", help="A method inside the LLM after one before it: fastv:0.5."),
]
RecipeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="For fitprune: what `visprune fit` wrote.")
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.", show_default="main"),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that comes with the checkpoint run.")
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="A Jinja chat template, or a JSON file with the key chat_template.",
        show_default="the checkpoint's",
    ),
]
Samples = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='To fit a FitPrune recipe on: lines of {"image": path, "prompt": text}.',
        show_default="a bundled set of 16",
    ),
]
MaxPrunePoints = Annotated[
    int | None,
    typer.Option(metavar="G", help="The most layers a fitted recipe may prune at.", show_default="any"),
]
BundleDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `visprune export` wrote.", show_default=False)
]
# As text: a path would change what a URL says.
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
