"""The options that name a checkpoint and say how its files are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from visprune.errors import UsageError
from visprune.options import Option, documented

__all__ = ["CheckpointOptions"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Options that every command which reads a checkpoint has.

    Raises:
        UsageError: Options that contradict each other.
    """

    revision: Annotated[
        str | None, Option("Branch, tag or commit of a hub id.", metavar="REV", shows="main")
    ] = None
    vision_tower: Annotated[
        str | Path | None,
        Option(
            "Vision tower of a checkpoint in LLaVA's original format: a directory or a hub id.",
            metavar="MODEL",
            shows="the one that it names",
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        Option(
            "LoRA adapter to merge, a directory or a hub id; may be given several times.", metavar="ADAPTER"
        ),
    ] = None
    pickled_weights: Annotated[
        bool, Option("Read weights from pickles (.bin), of which only plain tensors are accepted.")
    ] = False
    trust_remote_code: Annotated[bool, Option("Let Python code that comes with the checkpoint run.")] = False
    conversation: Annotated[
        str | None,
        Option(
            "Prompt form by its name: vicuna_v1, mistral_instruct, llava_llama_3, qwen and others.",
            metavar="NAME",
            shows="the checkpoint's",
        ),
    ] = None
    chat_template: Annotated[
        str | Path | None,
        Option(
            "A Jinja chat template, or a JSON file with the key chat_template.",
            metavar="FILE",
            shows="the checkpoint's",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.conversation is not None and self.chat_template is not None:
            raise UsageError(
                "Both --conversation and --chat-template were given, and each of them says how prompts look.",
                "Give one of them.",
            )
        if any(not str(adapter).strip() for adapter in self.adapter or ()):
            raise UsageError(
                "An --adapter is empty.", "Give a directory or a hub id, or leave --adapter out."
            )
