"""A conversation rendered into the one string the model was trained on.

Runs the Jinja2 template that the checkpoint ships, in the sandbox and with the helpers that transformers
gives it. Knows nothing of tokens beyond the texts of three special ones; encoding is in `text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from visprune.errors import BundleError, InputError, VispruneError

__all__ = ["MAX_RENDERED", "ChatTemplate", "Message"]

MAX_RENDERED = 4_000_000
"""Longest rendered conversation, in characters: far past any context, well within a small memory."""

_PROBE = "visprune probe"
_STAR = re.compile(r"%[#0\- +]*(\d*\.)?\*")  # a format's width or precision from its arguments


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

    A message's content reaches the template as transformers' processors pass it: a list of
    `{"type": "image"}` for each picture and one `{"type": "text", "text": ...}`. Older templates expect a
    string there. Which form a template takes is found once, by rendering a short message: if a list
    fails, is printed as a list, or loses the text or the picture, and a string works, then messages
    become strings, each picture as the image token and a newline in front.

    Without a template (`source=None`) a message is that same string, and messages are joined by newlines;
    roles and `add_generation_prompt` have no effect then.

    Args:
        source: The Jinja2 text, or None.
        bos_token: Text of the token that begins a sequence, if the model has one.
        eos_token: Text of the token that ends a sequence, if the model has one.
        image_token: Text of the image placeholder.

    Raises:
        BundleError: The template has a syntax error.
    """

    def __init__(
        self, source: str | None, bos_token: str | None, eos_token: str | None, image_token: str = "<image>"
    ) -> None:
        self._image_token = image_token
        # A token that a model lacks stays undefined, as in transformers: given as None it would print "None".
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "image_token": image_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._template: Template | None = None
        self._takes_lists = True
        if source is None:
            return
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise BundleError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}.",
                "Correct the template of the checkpoint and export again.",
            ) from None
        if not self._probe(self._template):
            self._takes_lists = False
            # Where neither form works, the usual one shows its error when it is used.
            self._takes_lists = not self._probe(self._template)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Renders a conversation.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: End with the words after which the model answers.

        Returns:
            The prompt, with one image token for each picture.

        Raises:
            InputError: There is no message, or the template refuses the conversation (roles that do not
                alternate, a system message it has no place for).
            BundleError: The template fails, does what its sandbox forbids, or renders more than
                `MAX_RENDERED` characters.
        """
        if not messages:
            raise InputError("The conversation is empty.", "Give at least one message.")
        if self._template is None:
            return "\n".join(self._as_string(message) for message in messages)
        return self._run(self._template, messages, add_generation_prompt)

    def _run(self, template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        as_content = _as_list if self._takes_lists else self._as_string
        parts: list[str] = []
        length = 0
        try:
            for part in template.generate(
                messages=[{"role": message.role, "content": as_content(message)} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED:
                    raise SecurityError(f"it renders more than {MAX_RENDERED:,} characters")
        except _RefusedError as error:
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

    def _probe(self, template: Template) -> bool:
        try:
            rendered = self._run(template, [Message("user", _PROBE, images=1)], add_generation_prompt=True)
        except VispruneError:
            return False
        printed = "{'type':" in rendered or '{"type":' in rendered
        return _PROBE in rendered and self._image_token in rendered and not printed

    def _as_string(self, message: Message) -> str:
        return f"{self._image_token}\n" * message.images + message.text


def _as_list(message: Message) -> list[dict[str, str]]:
    shown = [{"type": "image"}] * message.images + [{"type": "video"}] * message.videos
    return [*shown, {"type": "text", "text": message.text}]


class _RefusedError(TemplateError):
    """The template called `raise_exception`: the conversation is at fault, not the template."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on what one operator can allocate.

    The sandbox bounds `range` and `render` bounds the output, but a single `"a" * 10**12` or
    `"%0300000000d" % 1` is neither. Of a `%` with a text on its left, all numbers in that text may come to
    `MAX_RENDERED` together, and `*`, a width from elsewhere, is refused.

    Not bounded: what methods and filters allocate (`"a".ljust(10**9)`, `"{:0300000000d}".format(1)`,
    `|center`, `|format`, `|replace`), what grows step by step in a loop (`x ~ x`), and processor time.
    Nothing short of a process of its own stops those, so a template deserves as much trust as its weights.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it raises to a power")  # 9**9**9 never ends, and no prompt needs a power
        if operator == "%":
            if isinstance(left, str) and _widths(left) > MAX_RENDERED:
                raise SecurityError(f"it pads a text to more than {MAX_RENDERED:,} characters")
            return super().call_binop(context, operator, left, right)
        for sequence, count in ((left, right), (right, left)):
            repeats = isinstance(sequence, (str, list, tuple)) and isinstance(count, int)
            if repeats and len(sequence) * count > MAX_RENDERED:
                raise SecurityError(f"it repeats a text to more than {MAX_RENDERED:,} characters")
        return super().call_binop(context, operator, left, right)


def _widths(form: str) -> float:
    """No less than the widths and precisions of a format with `%`; its other numbers count as well."""
    numbers = re.findall(r"\d+", form)
    if _STAR.search(form) or any(len(number) > 12 for number in numbers):
        return inf
    return sum(map(int, numbers))


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the answers for training and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Environment:
    # As in transformers (utils/chat_template_utils.py), on which published templates rely.
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson  # jinja2's own escapes what HTML reserves
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
