"""`visprune chat`: a conversation about pictures, its turns on one cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import (
    BundleDir,
    Images,
    KeepTokens,
    LowMemory,
    Provider,
    Ratio,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from visprune.commands.run import open_pipeline
from visprune.terminal import note, print_json

if TYPE_CHECKING:
    from PIL import Image

    from visprune.runtime import Chat, Sampling
    from visprune.runtime.generation import GenerationLimits

__all__ = ["chat"]

_HELP = "/image PATH adds a picture to the next turn, /reset begins again, /quit ends."


def chat(  # noqa: PLR0913 - a command line's options
    bundle: BundleDir,
    *,
    system: System = None,
    image: Images = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ratio: Ratio = None,
    keep_tokens: KeepTokens = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    low_memory: LowMemory = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn.")] = False,
) -> None:
    """Talk about pictures. Each line is a turn; lines may also be piped in.

    /image PATH adds a picture to the next turn, /reset begins again with the pictures and the system prompt
    of the command line, /quit ends.

    Example: visprune-chat llava-fopru --image cat.png
    """
    from visprune.bundle import Bundle
    from visprune.runtime.generation import GenerationLimits
    from visprune.runtime.reading import check_texts
    from visprune.runtime.sampling import Sampling
    from visprune.runtime.vision.images import decode
    from visprune.runtime.vision.kept_tokens import keep_for

    # Whatever can be refused without the model is refused before gigabytes are hashed and loaded.
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    limits = GenerationLimits(max_new_tokens, tuple(stop or ()))
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    check_texts(opened, system=system, stop=limits.stop)
    keep = keep_for(manifest, ratio=ratio, keep_tokens=keep_tokens)
    pictures = [decode(one) for one in image or []]
    with open_pipeline(bundle, provider, threads, low_memory=low_memory) as pipeline:
        talk = _Talk(
            pipeline.chat(system=system, ratio=ratio, keep_tokens=keep_tokens),
            pictures,
            sampling,
            limits,
            about_pictures=None if as_json else keep.describe(manifest),
        )
        if not as_json:
            note(_HELP)
        for line in _lines():
            if not talk.take(line):
                break


class _Talk:
    """The loop's state: the conversation and the pictures that wait for the next turn.

    `about_pictures` is said when the first picture is there; None says nothing and prints answers as JSON.
    """

    def __init__(
        self,
        chat: Chat,
        pictures: list[Image.Image],
        sampling: Sampling,
        limits: GenerationLimits,
        *,
        about_pictures: str | None,
    ) -> None:
        self._chat = chat
        self._first = pictures
        self._waiting = list(pictures)
        self._sampling = sampling
        self._limits = limits
        self._as_json = about_pictures is None
        self._about_pictures = about_pictures
        self._tell_of_pictures()

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
        from visprune.runtime.vision.images import decode

        if name == "/quit":
            return False
        if name == "/reset":
            self._chat.reset()
            self._waiting = list(self._first)
        elif name == "/image" and rest:
            self._waiting.append(decode(rest.strip().strip("\"'")))
            self._tell_of_pictures()
        else:
            raise UsageError(f"There is no command {name!r} like this.", _HELP)
        return True

    def _tell_of_pictures(self) -> None:
        if self._about_pictures and self._waiting:
            note(self._about_pictures)
            self._about_pictures = None

    def _answer(self, prompt: str) -> None:
        stream = self._chat.stream(
            prompt,
            self._waiting,
            max_new_tokens=self._limits.max_new_tokens,
            sampling=self._sampling,
            stop=self._limits.stop,
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
    from visprune.errors import InputError

    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` line editing and history
    while True:
        try:
            line = input("you> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            raise InputError(
                f"The input is not valid {error.encoding.upper()}.", "Give the lines in that encoding."
            ) from None
        if line.strip():
            yield line.strip()
