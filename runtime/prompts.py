"""Conversion of a conversation to token ids, and checks of its texts before anything is computed.

This is the only module that uses a chat template together with a tokenizer. Of images it knows only the
number.
"""

from __future__ import annotations

from collections.abc import Sequence

from visprune.errors import InputError, UsageError
from visprune.manifest import Manifest, Text
from visprune.runtime.chat_template import ANY_NUMBER, ChatTemplate
from visprune.runtime.messages import Message
from visprune.runtime.text import Tokenizer

__all__ = [
    "check_message",
    "check_prompt",
    "check_stops",
    "check_system",
    "prompt_ids",
    "question_ids",
    "without_placeholders",
]


def prompt_ids(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, text: Text, rows: int
) -> list[int]:
    """Return the token ids of a conversation, with one image placeholder for each image and each video.

    Args:
        messages: The turns, oldest first.
        template: Chat template of the model.
        tokenizer: Tokenizer of the model.
        text: The manifest's `text`, which has the placeholders.
        rows: Number of rows of the embedding table.

    Raises:
        InputError: The template refuses the conversation or shows another number of images than it has, or
            a token has no row in the embedding table.
        BundleError: The template fails.

    If the last message is the assistant's, the prompt ends with its text: the answer is to continue it.
    """
    begun = bool(messages) and messages[-1].role == "assistant"
    ids = tokenizer.encode(template.render_begun(messages) if begun else template.render(messages))
    if text.video_token_id is not None:
        # The graphs replace every placeholder by visual tokens, so one kind of placeholder is enough.
        ids = [text.image_token_id if token == text.video_token_id else token for token in ids]
    found = ids.count(text.image_token_id)
    if found != sum(message.images + message.videos for message in messages):
        raise _picture_count_error(found, messages, template)
    beyond = next((token for token in ids if token >= rows and token != text.image_token_id), None)
    if beyond is not None:
        raise InputError(
            f"The prompt has the token {tokenizer.backend.id_to_token(beyond)!r} with the id {beyond}, and "
            f"the model's embedding table has {rows} rows.",
            "Leave this token out of the text; if nobody wrote it, the chat template or the tokenizer is "
            "that of another model.",
        )
    return ids


def question_ids(prompt: str, tokenizer: Tokenizer, method: str) -> tuple[int, ...]:
    """Return the token ids of a question by itself, for a method that chooses visual tokens by them.

    Args:
        prompt: The user's text, without the chat template.
        tokenizer: Tokenizer of the model.
        method: Name of the method, for the message.

    Raises:
        InputError: The text has no tokens.
    """
    ids = tuple(tokenizer.backend.encode(prompt, add_special_tokens=False).ids)
    if not ids:
        raise InputError(
            f"{method} chooses visual tokens by the question, and {prompt!r} has no tokens.",
            "Ask in words.",
        )
    return ids


def check_prompt(prompt: str, manifest: Manifest) -> None:
    """Refuse a prompt that no turn can have. Its length is checked later, with the whole conversation.

    Raises:
        InputError: The prompt is empty, is not valid Unicode, or contains the image token.
    """
    _check_text("prompt", prompt, manifest.text)


def check_message(message: Message, manifest: Manifest) -> None:
    """Refuse a message of any role that no conversation can have, but a system prompt that is not shown.

    Raises:
        InputError: The role is none of system, user and assistant; a user's message has neither a text nor
            an image; an image comes with another role; a system prompt is empty; or a text is not valid
            Unicode or contains the image token.
    """
    if message.role not in ("system", "user", "assistant"):
        raise InputError(
            f"A message has the unknown role {message.role!r}.", 'Use "system", "user" or "assistant".'
        )
    if message.visual and message.role != "user":
        raise InputError(
            f"A message of the role {message.role!r} has a picture.", "Put pictures into the user's messages."
        )
    if message.visual or message.role == "assistant":
        _check_content(f"{message.role}'s message", message.text, manifest.text)
    else:
        what = "prompt" if message.role == "user" else f"{message.role} prompt"
        _check_text(what, message.text, manifest.text)


def check_system(system: str | None, text: Text, template: ChatTemplate, whose: str = "this model") -> None:
    """Refuse a system prompt that no conversation can begin with.

    Args:
        system: The system prompt, or None for none.
        text: The manifest's `text`.
        template: Chat template of the model.
        whose: Owner of the template, for the message.

    Raises:
        InputError: The system prompt is empty, is not valid Unicode, or contains the image token; or the
            template cannot show a system prompt.
    """
    if system is None:
        return
    _check_text("system prompt", system, text)
    if not template.shows_system:
        raise InputError(
            f"The chat template of {whose} cannot show a system prompt: it refuses one, or leaves it out.",
            "Leave it out, or put its text before the question.",
        )


def check_stops(stops: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuse stops that can never match.

    Raises:
        UsageError: A stop contains the text of a special token and other text. It can never match, because
            an answer's text contains no special tokens.
    """
    special = tokenizer.special_tokens if stops else {}
    for stop in stops:
        held = next((token for token in special if token in stop), None)
        if held is not None and stop not in special:
            raise UsageError(
                f"The stop {stop!r} can never match: the special token {held!r} is no part of an answer's "
                "text.",
                f"Give {held!r} alone to end at that token, or text without it.",
            )


def without_placeholders(answer: str, text: Text) -> str:
    """Remove image and video tokens that an answer spells out: later turns would need images for them."""
    placeholders = [token for token in (text.image_token, text.video_token) if token]
    while any(token in answer for token in placeholders):
        for token in placeholders:
            answer = answer.replace(token, "")
    return answer


def _check_text(what: str, said: str, text: Text) -> None:
    """Refuse a prompt or system prompt (`what`) that no conversation can contain."""
    if not isinstance(said, str):
        raise InputError(f"The {what} is {type(said).__name__}, not a text.", "Give a text (str).")
    if not said.strip():
        hint = "Give a question or an instruction." if what == "prompt" else "Give a text, or leave it out."
        raise InputError(f"The {what} is empty.", hint)
    _check_content(what, said, text)


def _check_content(what: str, said: str, text: Text) -> None:
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8 arrive as lone surrogates
        raise InputError(f"The {what} is not valid UTF-8.", "Give it in UTF-8.") from None
    for token in (text.image_token, text.video_token):
        if token is not None and token in said:
            raise InputError(
                f"The {what} contains {token!r}, which stands for an image.",
                "Leave it out: pictures are put before the text of their turn without it.",
            )


def _picture_count_error(found: int, messages: Sequence[Message], template: ChatTemplate) -> InputError:
    images, videos = (sum(getattr(message, kind) for message in messages) for kind in ("images", "videos"))
    turns = sum(message.role == "user" for message in messages)
    has = _count(images, "picture") + (f" and {_count(videos, 'video')}" if videos else "")
    shows = template.describe()
    if videos or shows == ANY_NUMBER:
        return InputError(
            f"This model's chat template writes {_count(found, 'image placeholder')} for a conversation with "
            f"{has}.",
            "Leave out of the text what may stand for an image, or export the model with another chat "
            "template.",
        )
    return InputError(
        f"This model's chat template shows {shows}; this conversation has {has} in {_count(turns, 'turn')}.",
        "Give pictures as the template takes them, or export the model with another chat template.",
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
