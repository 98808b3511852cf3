"""A conversation as token ids, and what is refused of it before anything is computed.

The one place where a chat template and a tokenizer meet. Knows no pictures but their number.
"""

from __future__ import annotations

from collections.abc import Sequence

from visprune.errors import InputError, UsageError
from visprune.manifest import Manifest, Text
from visprune.runtime.chat_template import ANY_NUMBER, ChatTemplate, Message
from visprune.runtime.text import Tokenizer

__all__ = ["check_prompt", "check_stops", "check_system", "prompt_ids", "without_placeholders"]


def prompt_ids(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, text: Text, rows: int
) -> list[int]:
    """Token ids of a conversation, with one image placeholder for each picture and each video.

    Args:
        messages: The turns, oldest first.
        template: Of the model.
        tokenizer: Of the model.
        text: Its placeholders.
        rows: Of its embedding table.

    Raises:
        InputError: The template refuses the conversation, or shows another number of pictures than it has; or
            a token of it has no row in the embedding table.
        BundleError: The template fails.
    """
    ids = tokenizer.encode(template.render(messages))
    if text.video_token_id is not None:
        # What stands in a placeholder's place is all the same to the graphs.
        ids = [text.image_token_id if token == text.video_token_id else token for token in ids]
    found = ids.count(text.image_token_id)
    if found != sum(message.images + message.videos for message in messages):
        raise _picture_count_error(found, messages, template)
    beyond = next((token for token in ids if token >= rows and token != text.image_token_id), None)
    if beyond is not None:
        raise InputError(
            f"The prompt has the token {tokenizer.backend.id_to_token(beyond)!r} with the id {beyond}, and "
            f"the model's embedding table has {rows} rows.",
            "Leave this token out of the text; where nobody wrote it, the chat template or the tokenizer is "
            "that of another model.",
        )
    return ids


def check_prompt(prompt: str, manifest: Manifest) -> None:
    """Refuse a prompt that no turn can have. The length is checked with the whole conversation.

    Raises:
        InputError: It is empty, is not valid Unicode, or contains the image token.
    """
    _check_text("prompt", prompt, manifest.text)


def check_system(system: str | None, text: Text, template: ChatTemplate, whose: str = "this model") -> None:
    """Refuse a system prompt that no conversation can begin with; None is none.

    Args:
        system: The system prompt.
        text: Of the manifest.
        template: The model's.
        whose: The template is, in the message.

    Raises:
        InputError: It is empty, is not valid Unicode, or contains the image token; or the template cannot
            show one.
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
    """Refuse texts that no answer can end with.

    Raises:
        UsageError: One has a special token's text beside other text. It can never match, as special tokens
            are no part of an answer's text.
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
    """An answer as later turns tell it: an image token spelled in it would ask for an image."""
    placeholders = [token for token in (text.image_token, text.video_token) if token]
    while any(token in answer for token in placeholders):
        for token in placeholders:
            answer = answer.replace(token, "")
    return answer


def _check_text(what: str, said: str, text: Text) -> None:
    if not isinstance(said, str):
        raise InputError(f"The {what} is {type(said).__name__} and no text.", "Give a text.")
    if not said.strip():
        hint = "Give a question or an instruction." if what == "prompt" else "Give a text, or leave it out."
        raise InputError(f"The {what} is empty.", hint)
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a command line that are no text come as lone surrogates
        raise InputError(f"The {what} is not valid UTF-8.", "Give it in UTF-8.") from None
    for token in (text.image_token, text.video_token):
        if token is not None and token in said:
            raise InputError(
                f"The {what} contains {token!r}, which stands for an image.",
                "Leave it out: pictures are put before the text of their turn.",
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
