"""`visprune chat`: a conversation about images. Its turns share one cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import BundleDir
from visprune.commands.conversation_options import ConversationOptions, open_pipeline
from visprune.commands.option_fields import with_options
from visprune.terminal import note, print_json
from visprune.units import read_bytes

if TYPE_CHECKING:
    from PIL import Image

    from visprune.runtime import Chat
    from visprune.runtime.options import AnswerOptions

__all__ = ["chat"]

_GREETING = "/image PATH adds an image to the next turn, /reset begins again, /quit ends, /help lists these."
_COMMANDS = """\
/image PATH  Add an image to the next turn. May be given several times.
/reset       Begin again, with the images and the system prompt of the command line.
/quit        End the conversation.
/help        List these commands.
Any other line is a turn: the model answers it."""


@with_options(ConversationOptions)
def chat(
    bundle: BundleDir,
    *,
    options: ConversationOptions,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
    picture_cache: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory for features of images that come again; 0 is none."),
    ] = "64MB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn.")] = False,
) -> None:
    """Talk about images. Each line is a turn; lines may also be piped in.

    /image PATH adds an image to the next turn, /reset begins again with the images and the system prompt
    of the command line, /quit ends, /help lists these commands.

    A line that cannot be used, such as /image with a file that is not an image, is reported on stderr, and
    the conversation goes on with the next line. If lines are piped in, the exit code at the end is then 2.

    Example: visprune-chat llava-fopru --image cat.png
    """
    room = read_bytes("--picture-cache", picture_cache)
    checked = options.check(bundle, max_new_tokens)
    with open_pipeline(checked.bundle, options, room) as pipeline:
        talk = _Talk(
            pipeline.chat(**checked.chat),
            checked.pictures,
            checked.answer,
            about_pictures=None if as_json else checked.keep.describe(checked.bundle.manifest),
        )
        if not as_json:
            note(_GREETING)
        for line in _lines():
            if not talk.take(line):
                break
    # A person has seen the message; a script has only the exit code.
    if talk.refused and not _is_typed():
        raise typer.Exit(2)


class _Talk:
    """A conversation, and the images that wait for its next turn.

    Args:
        chat: The conversation.
        pictures: Images of the first turn, also after /reset.
        options: Options of each answer.
        about_pictures: Sentence that is printed once there is an image. With None, answers are printed as
            JSON, and nothing else is.

    Attributes:
        refused: Number of lines that could not be used.
    """

    def __init__(
        self,
        chat: Chat,
        pictures: list[Image.Image],
        options: AnswerOptions,
        *,
        about_pictures: str | None,
    ) -> None:
        self.refused = 0
        self._chat = chat
        self._first = pictures
        self._waiting = list(pictures)
        self._options = options
        self._as_json = about_pictures is None
        self._about_pictures = about_pictures
        self._note_pictures()

    def take(self, line: str) -> bool:
        """Obey or answer one line of the user. Return False if it ends the conversation."""
        from visprune.errors import VispruneError

        try:
            if line.startswith("/"):
                return self._obey(*line.split(maxsplit=1))
            self._answer(line)
        except VispruneError as error:
            self.refused += 1
            note(f"error: {error.what}\n  {error.hint}")
        return True

    def _obey(self, name: str, rest: str = "") -> bool:
        """Carry out a command. Return False if it ends the conversation."""
        from visprune.errors import UsageError
        from visprune.runtime.vision.images import decode

        if name == "/quit":
            return False
        if name == "/reset":
            self._chat.reset()
            self._waiting = list(self._first)
        elif name == "/help":
            note(_COMMANDS)
        elif name == "/image" and rest:
            self._waiting.append(decode(rest.strip().strip("\"'")))
            self._note_pictures()
        elif name == "/image":
            raise UsageError("/image has no path.", "Write /image and the path of an image.")
        else:
            raise UsageError(f"There is no command {name!r}.", "/help lists the commands.")
        return True

    def _note_pictures(self) -> None:
        if self._about_pictures and self._waiting:
            note(self._about_pictures)
            self._about_pictures = None

    def _answer(self, prompt: str) -> None:
        stream = self._chat.stream(prompt, self._waiting, **self._options)
        try:
            if not self._as_json:
                for piece in stream:
                    print(piece, end="", flush=True)
                print(flush=True)
            result = stream.result
        except KeyboardInterrupt:
            stream.close()
            if not _is_typed():
                raise
            note("\n(stopped: this turn is not part of the conversation)")
            return
        self._waiting = []
        if self._as_json:
            print_json(asdict(result), lines=True)


def _is_typed() -> bool:
    """Return whether a person types the lines."""
    return sys.stdin is not None and sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """Yield the user's lines, without empty ones, until the end of the input.

    Raises:
        InputError: The input is not text in the terminal's encoding.
    """
    from visprune.errors import InputError

    if sys.stdin is None:  # it was closed
        return
    if _is_typed():
        import readline  # noqa: F401 - gives `input` line editing and history
    while True:
        try:
            line = input("you> ") if _is_typed() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            raise InputError(
                f"The input is not valid {error.encoding.upper()}.", "Give the lines in that encoding."
            ) from None
        if line.strip():
            yield line.strip()
