"""Arguments and options that several verbs share, so that their names and help texts are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visprune.commands.conversation_options import ConversationOptions
from visprune.commands.option_fields import typer_option

__all__ = [
    "BundleDir",
    "Frames",
    "Images",
    "KeepTokens",
    "Model",
    "Provider",
    "Ratio",
    "System",
    "Threads",
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
Images = Annotated[list[str] | None, typer_option(ConversationOptions, "image")]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        "--video", metavar="PATH", help="A folder of frames or an animated image, for a model of videos."
    ),
]
Frames = Annotated[int, typer.Option(metavar="N", help="Frames taken of a video, evenly spaced.")]
System = Annotated[str | None, typer_option(ConversationOptions, "system")]
Ratio = Annotated[float | None, typer_option(ConversationOptions, "ratio")]
KeepTokens = Annotated[int | None, typer_option(ConversationOptions, "keep_tokens")]
Provider = Annotated[str, typer_option(ConversationOptions, "provider")]
Threads = Annotated[int | None, typer_option(ConversationOptions, "threads")]
