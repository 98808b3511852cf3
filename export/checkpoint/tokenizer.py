"""The tokenizer of a checkpoint.

A `tokenizer.json` is what the model was trained with, so it is taken as it is: transformers' classes would
rebuild the tokenizer from its vocabulary and may split digits and spaces differently. If a checkpoint has a
file of another kind, transformers converts it. In both cases a few texts are encoded with the checkpoint's
tokenizer and with the one to be written, and must give the same ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
import transformers

from visprune.errors import CheckpointError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.converted_tokenizer import (
    PROBES,
    convert,
    convert_sentencepiece,
    encoder,
    first_difference,
    parse,
    sentencepiece_encoder,
)
from visprune.export.files.small_files import added_tokens, file_exists, read_text

__all__ = ["CheckpointTokenizer", "read_tokenizer", "role_token"]


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """The tokenizer of a checkpoint, with the settings from the files beside it.

    Attributes:
        backend: The tokenizer, without truncation and padding.
        json: Text of its `tokenizer.json`.
        bos_token: Text of the token that begins a sequence, or None.
        eos_token: Text of the token that ends a sequence, or None.
        settings: Content of special_tokens_map.json, overridden by that of tokenizer_config.json.
        notes: Sentences that a user should read before using the bundle.
    """

    backend: tokenizers.Tokenizer
    json: str
    bos_token: str | None
    eos_token: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be read, or its conversion changes how texts are
            encoded.
        MissingExtraError: The package that reads its file is not installed.
    """
    path = checkpoint.path
    settings = checkpoint.read_json("tokenizer_config.json")
    settings = checkpoint.read_json("special_tokens_map.json") | settings
    file, model = path / "tokenizer.json", path / "tokenizer.model"
    probes = list(PROBES)
    if file_exists(file):
        text, name = read_text(file), file.name
        backend, encode = parse(text, file), encoder(parse(text, file))
        probes += [f"a {token.content}b" for token in backend.get_added_tokens_decoder().values()]
    else:
        text, name = "", model.name
        if file_exists(model):
            encode = sentencepiece_encoder(model)
            backend, probes = convert_sentencepiece(checkpoint, settings, encode)
        else:
            backend = convert(checkpoint)
            encode = encoder(parse(backend.to_str(), file))
    added = _add_tokens(backend, settings, checkpoint.read_json("added_tokens.json"), converted=not text)
    added |= _add_placeholders(backend, checkpoint.placeholders)
    if not text or added:
        text = backend.to_str(pretty=True)
    # The text is parsed once more, because that is what the runtime will do.
    if different := first_difference(encoder(parse(text, file)), encode, probes):
        raise CheckpointError(
            f"The tokenizer that would be written makes {different[1]} of {different[0]!r}, and the "
            f"checkpoint's {name} makes {different[2]}.",
            "Give the checkpoint the tokenizer.json that it was trained with.",
        )
    bos, eos = (_special_token(checkpoint, settings, key) for key in ("bos_token", "eos_token"))
    return CheckpointTokenizer(backend, text, bos, eos, settings, _notes(backend, settings, bos))


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], listed: Mapping[str, Any], *, converted: bool
) -> bool:
    """Add the tokens that only the files beside the tokenizer list; return whether there were any.

    Args:
        backend: The tokenizer, which is changed.
        settings: As in `CheckpointTokenizer`.
        listed: Content of added_tokens.json, ids by text.
        converted: Whether the tokenizer was converted from another file. A tokenizer.json knows its own ids
            best; a conversion gives new tokens the next free ids, which may be wrong.

    Raises:
        CheckpointError: The tokenizer would give a token another id than the files do.
    """
    wanted: dict[int, tokenizers.AddedToken] = {}
    for content, index in listed.items():
        if isinstance(index, int):
            wanted[index] = tokenizers.AddedToken(content, special=True, normalized=False)
    for index, entry in added_tokens(settings).items():
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        special = bool(entry.get("special"))
        wanted[index] = tokenizers.AddedToken(entry["content"], special=special, **flags)
    added = False
    for index, token in sorted(wanted.items()):
        got = backend.token_to_id(token.content)
        if got is not None and (got == index or not converted):
            continue
        if got is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            got, added = backend.token_to_id(token.content), True
        if got != index:
            raise CheckpointError(
                f"The files beside the tokenizer give {token.content!r} the id {index}, and the tokenizer's "
                f"next free id is {got}.",
                "Take tokenizer.json and tokenizer_config.json of one checkpoint.",
            )
    return added


def _add_placeholders(backend: tokenizers.Tokenizer, placeholders: Mapping[str, int]) -> bool:
    """Add placeholders that the tokenizer lacks, under ids of our choice; return whether there were any.

    A tokenizer gives a new token its next free id. Ids between that and the chosen one, which are rows of the
    embedding table that no text uses, are filled with tokens that no text contains.
    """
    added = False
    for text, index in sorted(placeholders.items(), key=lambda item: item[1]):
        if backend.token_to_id(text) is None:
            unused = [f"<|unused_{free}|>" for free in range(backend.get_vocab_size(), index)]
            backend.add_special_tokens([*unused, tokenizers.AddedToken(text, special=True, normalized=False)])
            added = True
    return added


def role_token(settings: Mapping[str, Any], role: str) -> str | None:
    """Return the text of the token of a role such as `bos_token`, or None.

    The settings hold its text, or an object with the text as its `content`.
    """
    value = settings.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special_token(checkpoint: Checkpoint, settings: Mapping[str, Any], key: str) -> str | None:
    """Return a special token by its role, from the files or else from transformers' tokenizer class."""
    if key in settings:
        return role_token(settings, key)
    with contextlib.suppress(Exception):  # a class that cannot be loaded names no token
        found = transformers.AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
        token = getattr(found, key, None)
        return token if isinstance(token, str) else None
    return None


def _notes(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], bos: str | None) -> tuple[str, ...]:
    """Return a note if the settings and the tokenizer disagree on whether a text begins with `bos`."""
    wanted = settings.get("add_bos_token")
    if not isinstance(wanted, bool) or bos is None:
        return ()
    begins = backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
    if begins == wanted:
        return ()
    does = "puts" if begins else "does not put"
    return (
        f"tokenizer_config.json has add_bos_token {str(wanted).lower()}, and tokenizer.json {does} {bos} in "
        "front; tokenizer.json is followed.",
    )
