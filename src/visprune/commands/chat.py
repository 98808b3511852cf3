"""`visprune chat`: a conversation about pictures, its turns on one cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.run import open_pipeline
from visprune.commands.terminal import note, print_json

if TYPE_CHECKING:
    from PIL import Image

    from visprune.runtime import Chat, Sampling

__all__ = ["chat"]

_HELP = "/image PATH adds a picture to the next turn, /reset begins again, /quit ends."


def chat(  # noqa: PLR0913 - a command line's options
    bundle: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory that `visprune export` wrote.", show_default=False),
    ],
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="FILE", help="A picture; may be given several times."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Randomness; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that make up this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes random answers repeatable.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of visual tokens to KEEP; by default the export's.")
    ] = None,
    keep_tokens: Annotated[int | None, typer.Option(help="The same as a number of tokens an image.")] = None,
    provider: Annotated[str, typer.Option(metavar="NAME", help="What runs the graphs: cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Processor threads.", show_default="physical cores")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn.")] = False,
) -> None:
    """Talk about pictures. Each line is a turn; lines may also be piped in.

    /image PATH adds a picture to the next turn, /reset begins again with the pictures of the command
    line, /quit ends.

    Example: visprune-chat llava-fopru --image cat.png
    """
    from visprune.bundle import Bundle
    from visprune.runtime.images import decode
    from visprune.runtime.pipeline import keep_tokens_for
    from visprune.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    pruning = Bundle.open(bundle).manifest.pruning
    keep = keep_tokens_for(pruning, ratio=ratio, keep_tokens=keep_tokens)
    pictures = [decode(path) for path in image or []]
    with open_pipeline(bundle, provider, threads) as pipeline:
        if not as_json:
            note(pruning.budget.describe(keep))
            note(_HELP)
        talk = _Talk(pipeline.chat(keep_tokens=keep), pictures, sampling, max_new_tokens, as_json=as_json)
        for line in _lines():
            if not talk.take(line):
                break


class _Talk:
    """The loop's state: the conversation and the pictures that wait for the next turn."""

    def __init__(
        self,
        chat: Chat,
        pictures: list[Image.Image],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        as_json: bool,
    ) -> None:
        self._chat = chat
        self._first = pictures
        self._waiting = list(pictures)
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._as_json = as_json

    def take(self, line: str) -> bool:
        """One line of the user. False ends the conversation."""
        from visprune.errors import VispruneError

        try:
            if line.startswith("/"):
                return self._command(*(line.split(maxsplit=1)))
            self._answer(line)
        except VispruneError as error:
            if not sys.stdin.isatty():
                raise  # a script should learn of it; a person can try again
            note(f"error: {error.what}\n  {error.hint}")
        return True

    def _command(self, name: str, rest: str = "") -> bool:
        from visprune.errors import UsageError
        from visprune.runtime.images import decode

        if name == "/quit":
            return False
        if name == "/reset":
            self._chat.reset()
            self._waiting = list(self._first)
        elif name == "/image" and rest:
            self._waiting.append(decode(rest.strip().strip("\"'")))
        else:
            raise UsageError(f"There is no command {name!r} like this.", _HELP)
        return True

    def _answer(self, prompt: str) -> None:
        stream = self._chat.stream(
            prompt, self._waiting, max_new_tokens=self._max_new_tokens, sampling=self._sampling
        )
        try:
            if not self._as_json:
                for piece in stream:
                    print(piece, end="", flush=True)
                print(flush=True)
            result = stream.result
        except KeyboardInterrupt:
            stream.close()
            if not sys.stdin.isatty():
                raise
            note("\n(stopped: this turn is not part of the conversation)")
            return
        self._waiting = []
        if self._as_json:
            print_json(asdict(result), lines=True)


def _lines() -> Iterator[str]:
    """The user's lines, without empty ones, until the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` line editing and history
    while True:
        try:
            line = input("you> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
