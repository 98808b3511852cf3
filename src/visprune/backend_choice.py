"""Options that choose what runs a bundle, for every command that loads one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from visprune.options import Option

__all__ = ["BackendChoice"]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend, its threads and its memory, as they are given on the command line."""

    provider: Annotated[
        str,
        Option(
            "Backend that runs the graphs (cpu, cuda, ort-tensorrt, ort-tensorrt-rtx) or the engines "
            "(tensorrt, tensorrt-rtx).",
            metavar="NAME",
        ),
    ] = "cpu"
    threads: Annotated[int | None, Option("Processor threads.", shows="physical cores")] = None
    low_memory: Annotated[
        bool,
        Option("Use less memory and more time: on the CPU half for fp16 weights; engines are loaded singly."),
    ] = False
