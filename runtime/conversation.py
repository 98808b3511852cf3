"""A conversation: messages and images go in, answers come out, and all turns share one cache.

Every turn renders the whole conversation and passes all of its tokens to the session, which computes only
those that the cache does not hold. So a turn gives the same answer as a new conversation with the same
messages would. The one exception: a method inside the LLM chose the tokens of earlier images by the prompt
of their own turn.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from visprune.runtime.generation import Generation, Stream
from visprune.runtime.loaded_model import LoadedModel
from visprune.runtime.messages import Message
from visprune.runtime.options import AnswerOptions, check_names
from visprune.runtime.prompts import check_prompt, check_system
from visprune.runtime.turns import Turn, prepare, respond
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.sources import Video, as_list

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from visprune.runtime.vision.sources import VisualInput

__all__ = ["Chat"]


class Chat:
    """One conversation. Make it with `Pipeline.chat`.

    Args:
        model: The model that answers.
        keep: How many visual tokens are kept of every image. It is fixed, because tokens of cached images
            cannot be chosen again.
        system: System prompt, which begins the conversation, or None.

    Raises:
        InputError: `check_system` refuses the system prompt.
    """

    def __init__(self, model: LoadedModel, keep: Keep, system: str | None = None) -> None:
        check_system(system, model.manifest.text, model.template)
        self._model = model
        self._session = model.session(keep)
        self._system = [] if system is None else [Message("system", system)]
        self._messages: list[Message] = []
        self._open: Stream | None = None
        self.keep = keep

    @property
    def messages(self) -> tuple[Message, ...]:
        """Messages of the finished turns, without the system prompt."""
        return tuple(self._messages)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache. The next turn reuses those that its prompt begins with."""
        return self._session.length

    def reset(self) -> None:
        """Forget the conversation except its system prompt."""
        self._end_open_turn()
        self._messages = []
        self._session.clear()

    def generate(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """Answer one turn. Arguments and errors are those of `stream`."""
        return self.stream(prompt, images, **options).result

    def stream(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Answer one turn piece by piece.

        The whole input is checked before this returns. The turn becomes part of the conversation when its
        last token is generated. A new turn ends an unfinished one, which is then dropped.

        Args:
            prompt: The user's message.
            images: New images, which are put before the text of this turn; videos come after the images.
            **options: `max_new_tokens`, `sampling` and `stop`, as in `Pipeline.stream`.

        Raises:
            TypeError: An option is unknown.
            InputError: `check_prompt` refuses the prompt, `prepare` refuses the conversation, or an image
                cannot be read.
            UsageError: max_new_tokens is out of range, or a stop can never match.
        """
        start = time.perf_counter()
        check_names("Chat.stream", options, AnswerOptions.__optional_keys__)
        check_prompt(prompt, self._model.manifest)
        return self._begin([_user_message(prompt, images)], options, start)

    def reply(self, messages: Message | Sequence[Message], **options: Unpack[AnswerOptions]) -> Stream:
        """Add messages to the conversation, and answer piece by piece.

        Args:
            messages: One or more messages, of any roles. If the last is the assistant's, the answer continues
                it.
            **options: As in `stream`.

        Raises:
            TypeError: An option is unknown.
            InputError: `prepare` refuses the conversation.
            UsageError: max_new_tokens is out of range, or a stop can never match.
        """
        check_names("Chat.reply", options, AnswerOptions.__optional_keys__)
        new = [messages] if isinstance(messages, Message) else messages
        return self._begin(new, options, time.perf_counter())

    def _begin(self, messages: Sequence[Message], options: AnswerOptions, started: float) -> Stream:
        self._end_open_turn()
        told = [*self._system, *self._messages, *messages]
        turn = prepare(self._model, told, self.keep, options, started)
        self._open = Stream(self._answer(turn))
        return self._open

    def _answer(self, turn: Turn) -> Generator[str, None, Generation]:
        """Compute the answer of a turn, and make it part of the conversation."""
        answer = yield from respond(self._model, self._session, turn, all_images=False)
        self._messages = list(turn.answered(answer.text, self._model.manifest)[len(self._system) :])
        return answer

    def _end_open_turn(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


def _user_message(prompt: str, images: VisualInput | Sequence[VisualInput] | None) -> Message:
    """Return a user's message: images first, then videos, then the text.

    Raises:
        InputError: An image cannot be read.
    """
    given = as_list(images)
    shown = [decode(image) for image in given if not isinstance(image, Video)]
    return Message("user", [*shown, *(one for one in given if isinstance(one, Video)), prompt])
