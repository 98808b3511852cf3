"""A conversation rendered into the one string the model was trained on.

Runs the Jinja2 template that the checkpoint ships, in `sandbox`, and finds out by trying what it can show.
Knows nothing of tokens beyond the texts of three special ones; encoding is in `text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import Template, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from visprune.errors import BundleError, InputError, VispruneError
from visprune.runtime.sandbox import MAX_RENDERED, RefusedError, template_environment

__all__ = ["ANY_NUMBER", "ChatTemplate", "Message"]

ANY_NUMBER = "any number of pictures"
"""What `ChatTemplate.describe` says of a template that shows each picture of every turn."""

_Form = Literal["parts", "string", "bare"]
_FORMS: tuple[_Form, ...] = ("parts", "string", "bare")
_SHOWS_ALL, _SHOWS_NONE = (0, 1, 2), (0, 0, 0)
_PROBE, _OTHER_PROBE = "visprune probe", "visprune tries"  # neither is a part of the other
_PRINTED_PART = re.compile(r"""["']type["']:\s*["'](text|image)["']""")  # of a list where a text should be


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "user", "assistant" or "system"; others as the template knows them.
        text: What is said. Pictures stand before it.
        images: Number of pictures shown with it.
        videos: Number of videos, which come after the pictures.

    Raises:
        InputError: The role is empty or the number of pictures is negative.
    """

    role: str
    text: str
    images: int = 0
    videos: int = 0

    def __post_init__(self) -> None:
        if not self.role:
            raise InputError("A message has no role.", 'Use "user", "assistant" or "system".')
        if self.images < 0:
            raise InputError(f"A message has {self.images} images.", "Give a number of 0 or more.")


class ChatTemplate:
    """The chat template of a model.

    A user's message reaches the template in one of three forms:

    1. a list, as transformers' processors pass it: `{"type": "image"}` for each picture and one
       `{"type": "text", "text": ...}`;
    2. a string, each picture as the image token and a newline in front;
    3. the text alone, where the template writes the image token itself.

    Which one is found once, by rendering short messages: the first form that shows no, one and two pictures
    as such, or else the first that shows one. Messages of other roles are lists where the users' are, or
    strings where the template loses or prints such lists.

    Without a template (`source=None`) a message is the second form, and messages are joined by newlines;
    roles and `add_generation_prompt` have no effect then.

    Args:
        source: The Jinja2 text, or None.
        bos_token: Text of the token that begins a sequence, if the model has one.
        eos_token: Text of the token that ends a sequence, if the model has one.
        image_token: Text of the image placeholder.

    Attributes:
        shown: Image tokens in what is rendered of one user's turn with no, one and two pictures; 0 where the
            template fails.

    Raises:
        BundleError: The template has a syntax error, or cannot be compiled.
    """

    def __init__(
        self, source: str | None, bos_token: str | None, eos_token: str | None, image_token: str = "<image>"
    ) -> None:
        self._image_token = image_token
        # A token that a model lacks stays undefined, as in transformers: given as None it would print "None".
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "image_token": image_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._template: Template | None = None
        self._form: _Form = "string"
        self._lists: dict[str, bool] = {}  # by role
        self.shown: tuple[int, int, int] = _SHOWS_ALL
        if source is None:
            return
        try:
            self._template = template_environment().from_string(source)
        except Exception as error:  # Python's own limits too, on what is nested and on long numbers
            what = f"cannot be compiled: {error}"
            if isinstance(error, TemplateSyntaxError):
                what = f"has a syntax error in line {error.lineno}: {error.message}"
            raise BundleError(
                f"The chat template {what}.", "Correct the template of the checkpoint and export again."
            ) from None
        found = {form: self._try_form(form) for form in _FORMS}
        fit = [form for form in _FORMS if found[form] == _SHOWS_ALL]
        fit += [form for form in _FORMS if found[form][1] == 1]
        fit += [form for form in _FORMS[:2] if found[form][1]]
        self._form = [*fit, _FORMS[0]][0]  # where none works, the usual one shows its error when it is used
        self.shown = found[self._form]

    @property
    def shows_system(self) -> bool:
        """Whether a system message's text stands in the rendered conversation."""
        return self._template is None or self._shows_text("system")

    def describe(self) -> str:
        """What the template can show, to be read after "shows"."""
        none, one, two = self.shown
        if self.shown == _SHOWS_NONE:
            return "no pictures"
        if self.shown == _SHOWS_ALL:
            return f"{ANY_NUMBER}{self._where_shown('')}"
        if (none, one) == (0, 1) and two < 2:
            return f"at most one picture{self._where_shown(' in a turn')}"
        if (none, one) == (1, 1) and two < 2:
            return f"exactly one picture{self._where_shown(' in each turn of the user')}"
        return f"{none}, {one} and {two} image tokens in turns with no, one and two pictures"

    def turn_end(self) -> str:
        """What the template writes behind the last answer of a conversation; "" where that is not found."""
        if self._template is None:
            return ""
        try:
            rendered = self.render(
                [self._probe_turn(), Message("assistant", _OTHER_PROBE)], add_generation_prompt=False
            )
        except VispruneError:
            return ""
        return rendered.rpartition(_OTHER_PROBE)[2] if _OTHER_PROBE in rendered else ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Renders a conversation.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: End with the words after which the model answers.

        Returns:
            The prompt, with one image token for each picture, as far as the template can (see `shown`).

        Raises:
            InputError: There is no message, or the template refuses the conversation (roles that do not
                alternate, a system message it has no place for).
            BundleError: The template fails, does what its sandbox forbids, or renders more than
                `MAX_RENDERED` characters.
        """
        if not messages:
            raise InputError("The conversation is empty.", "Give at least one message.")
        given = [{"role": message.role, "content": self._content(message)} for message in messages]
        if self._template is None:
            return "\n".join(str(one["content"]) for one in given)
        return self._render(self._template, given, add_generation_prompt)

    def _render(self, template: Template, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        parts: list[str] = []
        length = 0
        try:
            for part in template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED:
                    raise SecurityError(f"it renders more than {MAX_RENDERED:,} characters")
        except RefusedError as error:
            raise InputError(
                f"The model's chat template refuses this conversation: {error.message}.",
                "Change the roles or the order of the messages as it says.",
            ) from None
        except SecurityError as error:
            raise BundleError(
                f"The chat template does what a template may not: {error.message}.",
                "Take the model from a source you trust.",
            ) from None
        except Exception as error:  # a template runs arbitrary expressions, and they raise anything
            raise BundleError(
                f"The chat template fails on this conversation: {error}.",
                "Correct the template of the checkpoint and export again.",
            ) from error
        return "".join(parts)

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        if self._template is not None and self._as_list(message.role):
            shown = [{"type": "image"}] * message.images + [{"type": "video"}] * message.videos
            return [*shown, {"type": "text", "text": message.text}]
        if self._form == "bare":
            return message.text
        # To a model a video's placeholder is an image's.
        return f"{self._image_token}\n" * (message.images + message.videos) + message.text

    def _as_list(self, role: str) -> bool:
        """Whether messages of a role are lists."""
        usual = self._form == "parts"
        if role == "user":
            return usual
        if role not in self._lists:
            for self._lists[role] in (usual, not usual):  # `_shows_text` renders with what stands there
                if self._shows_text(role):
                    return self._lists[role]
            self._lists[role] = usual
        return self._lists[role]

    def _probe_turn(self) -> Message:
        """A turn that the template can show, with a picture if possible."""
        return Message("user", _PROBE, images=int(self.shown[1] == 1))

    def _try_form(self, form: _Form) -> tuple[int, int, int]:
        """`shown` in this form."""
        self._form = form
        one = self._count_images([Message("user", _PROBE, images=1)])
        if one is None:
            return _SHOWS_NONE
        none, two = (self._count_images([Message("user", _PROBE, images=images)]) for images in (0, 2))
        return none or 0, one, two or 0

    def _shows_text(self, role: str) -> bool:
        """Whether the text of a message of a role is shown, and the user's turn beside it as ever."""
        user, other = self._probe_turn(), Message(role, _OTHER_PROBE)
        messages = [other, user] if role == "system" else [user, other]
        return self._count_images(messages, _OTHER_PROBE) == self.shown[user.images]

    def _where_shown(self, usual: str) -> str:
        """Where pictures are shown: as usual, or in the first turn alone."""
        turns = [self._probe_turn(), Message("assistant", _OTHER_PROBE), self._probe_turn()]
        return ", in the first turn of the user alone" if self._count_images(turns) == 1 else usual

    def _count_images(self, messages: Sequence[Message], *told: str) -> int | None:
        """Image tokens in a rendered conversation; None where that fails, or loses or garbles a text."""
        try:
            rendered = self.render(messages, add_generation_prompt=messages[-1].role == "user")
        except VispruneError:
            return None
        if _PRINTED_PART.search(rendered) or not all(text in rendered for text in (_PROBE, *told)):
            return None
        return rendered.count(self._image_token)
