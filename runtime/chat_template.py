"""Chat template: renders a conversation into the form of text that the model was trained on.

It runs the Jinja2 template of the checkpoint in `sandbox`, and finds out by trial which images and roles
the template can show. It knows the texts of three special tokens; `text` converts texts to token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import Template, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from visprune.errors import BundleError, InputError, VispruneError
from visprune.runtime.messages import Message, Part, is_video
from visprune.runtime.sandbox import MAX_RENDERED, RefusedError, template_environment

__all__ = ["ANY_NUMBER", "ChatTemplate"]

ANY_NUMBER = "any number of pictures"
"""Result of `ChatTemplate.describe` for a template that shows each image of every turn."""

_Form = Literal["parts", "string", "bare"]
_FORMS: tuple[_Form, ...] = ("parts", "string", "bare")
_SHOWS_ALL, _SHOWS_NONE = (0, 1, 2), (0, 0, 0)
_PROBE, _OTHER_PROBE = "visprune probe", "visprune tries"  # neither contains the other
_END = "visprune ends here "  # the space shows whether a template removes white space at the end of a text
# A part of a message list that a template printed, because it expects a text.
_PRINTED_PART = re.compile(r"""["']type["']:\s*["'](text|image)["']""")


class ChatTemplate:
    """The chat template of a model.

    A user's message reaches the template in one of three forms:

    1. a list, as transformers' processors pass it: `{"type": "image"}` for each image and
       `{"type": "text", "text": ...}` for each text, in order;
    2. a string, with the image token and a newline for each image;
    3. the text alone, for a template that writes the image token itself.

    The form is chosen once, by rendering short messages. It is the first form with which messages with no,
    one and two images are rendered with as many image tokens, or else the first that shows one image.
    Messages of other roles are lists if the user's are, or strings if the template drops such lists or prints
    them as they are.

    Without a template (`source=None`), a message has the second form, and messages are joined by newlines;
    roles and `add_generation_prompt` have no effect then.

    Args:
        source: Source text of the Jinja2 template, or None.
        bos_token: Text of the token that begins a sequence, or None if the model has none.
        eos_token: Text of the token that ends a sequence, or None if the model has none.
        image_token: Text of the image placeholder.

    Attributes:
        shown: Number of image tokens in a rendered turn of the user with no, one and two images; 0 if the
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
        except Exception as error:  # also Python's own limits on nesting and on long numbers
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
        self._form = [*fit, _FORMS[0]][0]  # if none works, the usual form raises its error when it is used
        self.shown = found[self._form]

    @property
    def shows_system(self) -> bool:
        """Whether the text of a system message appears in the rendered conversation."""
        return self._template is None or self._shows_text("system", self._as_list("system"))

    def describe(self) -> str:
        """Describe the images that the template can show, as a phrase that follows "shows"."""
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
        """Return the text that the template writes after the last answer; "" if it is not found."""
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
        """Render a conversation.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: Whether to end with the text after which the model answers.

        Returns:
            The prompt, with one image token for each image, as far as the template can (see `shown`).

        Raises:
            InputError: There is no message, or the template refuses the conversation, for instance because
                roles do not alternate, or because it has no place for a system message.
            BundleError: The template fails, does something that the sandbox forbids, or renders more than
                `MAX_RENDERED` characters.
        """
        return self._render(messages, add_generation_prompt, self._lists)

    def render_begun(self, messages: Sequence[Message]) -> str:
        """Render a conversation whose last message is an answer that the model is to continue.

        The prompt ends with the text of this message, as with `continue_final_message` of transformers.

        Raises:
            InputError: As for `render`, or the template does not show the begun answer.
            BundleError: As for `render`.
        """
        *before, begun = messages
        marked = Message(begun.role, f"{begun.text}{_END}")
        rendered = self.render([*before, marked], add_generation_prompt=False)
        shown, end, after = rendered.rpartition(_END.strip())
        if not end:
            raise InputError(
                "The model's chat template does not show an answer that is begun.",
                "Leave the last message out, so that it ends with the user's.",
            )
        return shown if after.startswith(" ") or self._template is None else shown.rstrip()

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, lists: dict[str, bool]
    ) -> str:
        """Render with the roles in `lists` as lists or strings; roles that are missing are tried out."""
        if not messages:
            raise InputError("The conversation is empty.", "Give at least one message.")
        given = [
            {"role": message.role, "content": self._content(message, lists.get(message.role))}
            for message in messages
        ]
        if self._template is None:
            return "\n".join(str(one["content"]) for one in given)
        return self._run(self._template, given, add_generation_prompt)

    def _run(self, template: Template, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
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
                f"The chat template does something that is forbidden: {error.message}.",
                "Take the model from a source you trust.",
            ) from None
        except Exception as error:  # a template evaluates arbitrary expressions, which can raise anything
            raise BundleError(
                f"The chat template fails on this conversation: {error}.",
                "Correct the template of the checkpoint and export again.",
            ) from error
        return "".join(parts)

    def _content(self, message: Message, as_list: bool | None) -> str | list[dict[str, str]]:
        if self._template is not None and (self._as_list(message.role) if as_list is None else as_list):
            return [_listed(part) for part in message.parts]
        if self._form == "bare":
            return message.text
        content = ""
        for part in message.parts:
            if isinstance(part, str):
                content += part
            else:  # every placeholder is an image's; the graphs do not tell videos from images
                line = "\n" if content and not content[-1].isspace() else ""
                content += f"{line}{self._image_token}\n"
        return content

    def _as_list(self, role: str) -> bool:
        """Return whether messages of a role are lists."""
        usual = self._form == "parts"
        if role == "user":
            return usual
        if role not in self._lists:
            shown = [as_list for as_list in (usual, not usual) if self._shows_text(role, as_list)]
            self._lists[role] = shown[0] if shown else usual
        return self._lists[role]

    def _probe_turn(self) -> Message:
        """Return a turn of the user that the template can show, with an image if possible."""
        return Message.blank("user", _PROBE, images=int(self.shown[1] == 1))

    def _try_form(self, form: _Form) -> tuple[int, int, int]:
        """Use a form, and return the value of `shown` with it."""
        self._form = form
        one = self._count_images([Message.blank("user", _PROBE, images=1)])
        if one is None:
            return _SHOWS_NONE
        none, two = (self._count_images([Message.blank("user", _PROBE, images=images)]) for images in (0, 2))
        return none or 0, one, two or 0

    def _shows_text(self, role: str, as_list: bool) -> bool:
        """Return whether the text of a role's message is rendered, and the user's turn as without it."""
        user, other = self._probe_turn(), Message(role, _OTHER_PROBE)
        messages = [other, user] if role == "system" else [user, other]
        return self._count_images(messages, _OTHER_PROBE, lists={role: as_list}) == self.shown[user.images]

    def _where_shown(self, usual: str) -> str:
        """Return the phrase for templates that show images in the first turn only, or `usual`."""
        turns = [self._probe_turn(), Message("assistant", _OTHER_PROBE), self._probe_turn()]
        return ", in the first turn of the user alone" if self._count_images(turns) == 1 else usual

    def _count_images(
        self, messages: Sequence[Message], *told: str, lists: dict[str, bool] | None = None
    ) -> int | None:
        """Count the image tokens of a rendered conversation; None if it fails, or loses or garbles a text."""
        try:
            add_generation_prompt = messages[-1].role == "user"
            rendered = self._render(messages, add_generation_prompt, self._lists if lists is None else lists)
        except VispruneError:
            return None
        if _PRINTED_PART.search(rendered) or not all(text in rendered for text in (_PROBE, *told)):
            return None
        return rendered.count(self._image_token)


def _listed(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if is_video(part) else "image"}
