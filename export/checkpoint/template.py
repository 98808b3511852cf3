"""The chat template of a checkpoint: where it is, and what it does with pictures and at the end of a turn.

A template is rendered at export as the runtime will render it, so that a bundle never promises pictures that
no prompt of it can show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.errors import CheckpointError, UsageError, VispruneError
from visprune.export.checkpoint.small_files import is_there, read_object, read_text
from visprune.export.checkpoint.tokenizer import token_of
from visprune.runtime.chat_template import ANY_NUMBER, ChatTemplate, Message

if TYPE_CHECKING:
    from visprune.runtime.text import Tokenizer

__all__ = ["check_placeholders", "find_template", "template_notes", "turn_ends", "with_tokens"]


_QUESTIONS = ("What is this?", "Jump vexingly: 0 or 9?")  # two, so that no letter passes for a placeholder
# Roles of tokens by which templates may write them, beside the two that every template is given.
_ROLES = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def find_template(path: Path, given: str | Path | None) -> str | None:
    """The text of the chat template, in the places where transformers looks for it, in its order.

    Args:
        path: The checkpoint.
        given: A file that takes the place of the checkpoint's own: Jinja, or JSON with the key
            `chat_template`.

    Raises:
        UsageError: The file that was given cannot be read, or has no template.
        CheckpointError: A file of the checkpoint cannot be read.
    """
    if given is not None:
        return _given(Path(given))
    found = read_object(path / "processor_config.json").get("chat_template")
    found = found or read_object(path / "chat_template.json").get("chat_template")
    if not found and is_there(path / "chat_template.jinja"):
        found = read_text(path / "chat_template.jinja")
    return _one(found or read_object(path / "tokenizer_config.json").get("chat_template"))


def _given(file: Path) -> str:
    try:
        text = read_text(file)
    except CheckpointError as error:
        raise UsageError(f"The chat template cannot be used: {error.what}", error.hint) from None
    if file.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        text = _one(found.get("chat_template") if isinstance(found, dict) else None) or ""
    if not text.strip():
        raise UsageError(
            f"{file} holds no chat template.", "Give a Jinja file, or a JSON file with the key chat_template."
        )
    return text


def _one(found: Any) -> str | None:
    """The default one where there are several, by name or in a list."""
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    if found and not isinstance(found, str):
        raise CheckpointError(
            f"The chat template is {type(found).__name__} and no text.",
            "Correct it, or give a template with --chat-template FILE.",
        )
    return found or None


def with_tokens(source: str | None, said: Mapping[str, Any]) -> str | None:
    """A template that knows the tokens it names by their roles, as transformers would give them.

    Args:
        source: Of the template.
        said: What the tokenizer's files say, as `token_of` reads it.
    """
    for role in _ROLES:
        token = token_of(said, role)
        if source and token is not None and re.search(rf"\b{role}\b", source):
            source = f"{{% set {role} = {json.dumps(token)} %}}{source}"
    return source


def check_placeholders(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuse a template that does not show a picture by the placeholder that the model replaces.

    Raises:
        CheckpointError: One picture does not give the placeholder exactly once, or the question is lost.
        BundleError: The template fails on a question about a picture.
    """
    for question in _QUESTIONS:
        rendered = template.render([Message("user", question, images=1)])
        if question not in rendered:
            raise CheckpointError(
                "The chat template leaves out what the user says.",
                "Correct it, or give the model's own template with --chat-template FILE.",
            )
        found = tokenizer.encode(rendered).count(tokenizer.image_token_id)
        if found != 1:
            break
    else:
        return
    shown = " ".join(repr(token) for token in _of_a_picture(template, tokenizer, rendered))
    raise CheckpointError(
        f"The model replaces the token {tokenizer.image_token!r} ({tokenizer.image_token_id}) by a picture, "
        f"and the chat template writes it {found} times for one picture"
        f"{f'; what it writes for one is {shown}' if shown else ''}.",
        "Correct image_token_index (or image_token_id) in config.json, or give the model's own template with "
        "--chat-template FILE.",
    )


def _of_a_picture(template: ChatTemplate, tokenizer: Tokenizer, rendered: str) -> list[str]:
    """The tokens that a rendered question has because there is a picture, with their ids."""
    try:
        plain = set(tokenizer.encode(template.render([Message("user", _QUESTIONS[-1])])))
    except VispruneError:  # a template may insist on a picture
        return []
    others = dict.fromkeys(token for token in tokenizer.encode(rendered) if token not in plain)
    return [f"{tokenizer.backend.id_to_token(token)} ({token})" for token in others]


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer, ends: Sequence[int]) -> tuple[int, ...]:
    """The special token by which the template ends an assistant's turn, where it is none of `ends`.

    A model that was trained on such turns writes that token when it has answered. It is found where nothing
    but special tokens and white space follows the answer.
    """
    tail = template.turn_end().strip()
    ids = tokenizer.backend.encode(tail, add_special_tokens=False).ids if tail else []
    ids = [token for token in ids if tokenizer.decode([token]).strip() or token in tokenizer.hidden_ids]
    if not ids or not set(ids) <= tokenizer.hidden_ids or ids[0] in (*ends, tokenizer.image_token_id):
        return ()
    return (ids[0],)


def template_notes(source: str | None, template: ChatTemplate) -> tuple[str, ...]:
    """What a user should know of the template before anything is asked."""
    if source is None:
        return (
            "The checkpoint has no chat template: prompts are handed to the model as they are, without the "
            "words around a turn that it was trained with. Give them with --chat-template FILE.",
        )
    if template.describe() != ANY_NUMBER:
        return (f"The chat template shows {template.describe()}.",)
    return ()
