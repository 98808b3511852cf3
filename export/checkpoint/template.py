"""The chat template of a checkpoint: finding it, and checking how it shows images and ends a turn.

The export renders the template as the runtime will, so that a bundle never promises images that its prompts
cannot show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.errors import CheckpointError, UsageError, VispruneError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.tokenizer import role_token
from visprune.export.files.small_files import PROCESSOR_CONFIG, file_exists, read_text
from visprune.runtime.chat_template import ANY_NUMBER, ChatTemplate
from visprune.runtime.messages import Message

if TYPE_CHECKING:
    from visprune.runtime.text import Tokenizer

__all__ = [
    "check_placeholders",
    "define_role_tokens",
    "extra_turn_ends",
    "find_template",
    "read_template_file",
    "template_notes",
]

# Two questions, so that a letter which happens to appear once in one of them does not pass for a placeholder.
_QUESTIONS = ("What is this?", "Jump vexingly: 0 or 9?")
# Variables by which templates may name special tokens, besides bos_token and eos_token, which are always
# given.
_ROLES = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def find_template(checkpoint: Checkpoint) -> str | None:
    """Return the source of the chat template, or None.

    The files of the checkpoint are searched in the order of transformers.

    Raises:
        CheckpointError: A file of the checkpoint cannot be read.
    """
    if checkpoint.chat_template is not None:
        return checkpoint.chat_template
    found = checkpoint.read_json(PROCESSOR_CONFIG).get("chat_template")
    found = found or checkpoint.read_json("chat_template.json").get("chat_template")
    file = checkpoint.path / "chat_template.jinja"
    if not found and file_exists(file):
        found = read_text(file)
    return _default_template(found or checkpoint.read_json("tokenizer_config.json").get("chat_template"))


def read_template_file(file: Path) -> str:
    """Read a chat template that the user gives: Jinja, or JSON with the key `chat_template`.

    Raises:
        UsageError: The file cannot be read or has no template.
    """
    try:
        text = read_text(file)
    except CheckpointError as error:
        raise UsageError(f"The chat template cannot be used: {error.what}", error.hint) from None
    if file.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        text = _default_template(found.get("chat_template") if isinstance(found, dict) else None) or ""
    if not text.strip():
        raise UsageError(
            f"{file} holds no chat template.", "Give a Jinja file, or a JSON file with the key chat_template."
        )
    return text


def _default_template(found: Any) -> str | None:
    """Return the template itself, or the default one of a list or mapping of named templates."""
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    if found and not isinstance(found, str):
        raise CheckpointError(
            f"The chat template is of the type {type(found).__name__} and not a text.",
            "Correct it, or give a template with --chat-template FILE.",
        )
    return found or None


def define_role_tokens(source: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the template with a definition of each special token that it names by its role.

    Transformers passes these tokens as variables; the runtime does not.

    Args:
        source: Source of the template, or None.
        settings: Content of the tokenizer's settings files; see `role_token`.
    """
    for role in _ROLES:
        token = role_token(settings, role)
        if source and token is not None and re.search(rf"\b{role}\b", source):
            source = f"{{% set {role} = {json.dumps(token)} %}}{source}"
    return source


def check_placeholders(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuse a template that does not write an image as the placeholder that the model replaces.

    Raises:
        CheckpointError: The placeholder does not appear exactly once for one image, or the question is lost.
        BundleError: The template fails on a question about an image.
    """
    for question in _QUESTIONS:
        rendered = template.render([Message.blank("user", question, images=1)])
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
    shown = " ".join(repr(token) for token in _picture_tokens(template, tokenizer, rendered))
    raise CheckpointError(
        f"The model replaces the token {tokenizer.image_token!r} ({tokenizer.image_token_id}) by a picture, "
        f"and the chat template writes it {found} times for one picture"
        f"{f'; what it writes for one is {shown}' if shown else ''}.",
        "Correct image_token_index (or image_token_id) in config.json, or give the model's own template with "
        "--chat-template FILE.",
    )


def _picture_tokens(template: ChatTemplate, tokenizer: Tokenizer, rendered: str) -> list[str]:
    """Return the tokens, with their ids, that a rendered question has only if it has an image."""
    try:
        plain = set(tokenizer.encode(template.render([Message("user", _QUESTIONS[-1])])))
    except VispruneError:  # a template may insist on a picture
        return []
    others = dict.fromkeys(token for token in tokenizer.encode(rendered) if token not in plain)
    return [f"{tokenizer.backend.id_to_token(token)} ({token})" for token in others]


def extra_turn_ends(template: ChatTemplate, tokenizer: Tokenizer, ends: Sequence[int]) -> tuple[int, ...]:
    """Return the special token by which the template ends an assistant's turn, unless it is one of `ends`.

    A model that was trained on such turns writes that token at the end of its answer. The token is returned
    only if nothing but special tokens and white space follows an answer in the template.
    """
    tail = template.turn_end().strip()
    ids = tokenizer.backend.encode(tail, add_special_tokens=False).ids if tail else []
    ids = [token for token in ids if tokenizer.decode([token]).strip() or token in tokenizer.hidden_ids]
    if not ids or not set(ids) <= tokenizer.hidden_ids or ids[0] in (*ends, tokenizer.image_token_id):
        return ()
    return (ids[0],)


def template_notes(source: str | None, template: ChatTemplate) -> tuple[str, ...]:
    """Return sentences on the template that a user should read before using the bundle."""
    if source is None:
        return (
            "The checkpoint has no chat template: prompts are handed to the model as they are, without the "
            "words around a turn that it was trained with. Give a template with --chat-template FILE.",
        )
    if template.describe() != ANY_NUMBER:
        return (f"The chat template shows {template.describe()}.",)
    return ()
